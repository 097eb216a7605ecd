"""The whole layer: fused, composed, stacked, listed, transposed and interleaved are one function; gradients are computed, kept and
allocated only when needed; bad input is an error with the values in it. Autograd and autocast: test_autograd.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext import ops, reference
from moe_ext._needs import Needs
from moe_ext.experts import ExpertSpec, ExpertWeights
from moe_ext.functional import grouped_experts
from moe_ext.testing import assert_accurate
from tests.helpers.op_table import LAYERS, STACKED_ONLY, Case, Maker, layer, listed

fused, fused_list = torch.ops.moe.grouped_forward.default, torch.ops.moe.grouped_forward.list
layers = pytest.mark.parametrize("name", LAYERS)
BITS = (Needs.HIDDEN_STATES, Needs.TOP_K_WEIGHTS, Needs.GATE_UP, Needs.DOWN, Needs.GATE_UP_BIAS, Needs.DOWN_BIAS)
POSITIONS = (0, 2, 3, 4, 5, 6)  # of those arguments


def inputs(name: str, dtype: torch.dtype, integers: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return Case("grouped_forward", name).inputs(dtype, integers)


def as_data(args: tuple[Any, ...], options: dict[str, Any], is_list: bool = False) -> tuple[tuple[Any, ...], ExpertWeights, ExpertSpec]:
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    if is_list:
        names = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")
    return args[:3], ExpertWeights(**dict(zip(names, args[3:], strict=True))), ExpertSpec(**options)


class Recorder(TorchDispatchMode):
    """Names of the ops that run, and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), kwargs or {}, result))
        return result

    @property
    def moe_ops(self) -> list[str]:
        return [name.partition(".")[2] for name, _, _ in self.calls if name.startswith(("moe.", "moe_ext."))]


def saved_by(function: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and the tensors kept for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return function(), kept


# ---- one function, many forms
@layers
def test_fused_equals_composed_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    args, options = inputs(name, dtype)
    routing, weights, spec = as_data(args, options)
    expected = fused(*args, **options)
    assert torch.equal(grouped_experts(*routing, weights, spec, path="composed"), expected)
    assert torch.equal(grouped_experts(*routing, weights, spec, path="fused"), expected)
    assert torch.equal(torch.ops.moe_ext._grouped_forward_train(*args, **options)[0], expected)
    if name not in STACKED_ONLY:
        args, options = listed(LAYERS[name])(Maker(dtype, f"grouped_forward-{name}/0"))
        routing, weights, spec = as_data(args, options, is_list=True)
        for path in ("composed", "fused"):
            assert torch.equal(grouped_experts(*routing, weights, spec, path=path), expected)


def gradients(function: Callable[..., Tensor], args: tuple[Any, ...], needed: tuple[int, ...] = POSITIONS) -> list[Tensor | None]:
    leaves = [a.detach().requires_grad_() if i in needed and isinstance(a, Tensor) else a for i, a in enumerate(args)]
    out = function(*leaves)
    grad = Maker(torch.float32, "grad", integers=bool((args[0] == args[0].round()).all())).floats(*out.shape).bfloat16().to(out.dtype)
    chosen = [leaves[i] for i in needed if isinstance(leaves[i], Tensor)]
    return [out.detach(), *torch.autograd.grad(out, chosen, grad)]


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("float32_routing",)])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_every_layout_is_exact_on_whole_numbers(name: str, activation: str) -> None:
    """Forward and all gradients, fused and composed, in the layout of the case and transposed and interleaved: one set of numbers."""
    args, options = inputs(name, torch.float64, integers=True)
    options = {**options, "activation": activation, "alpha": None}
    expected = gradients(lambda *a: fused(*a, **options), args)
    routing, weights, spec = as_data(args, options)
    composed = gradients(lambda *a: grouped_experts(*a[:3], as_data(a, options)[1], spec, path="composed"), args)
    assert all(torch.equal(a, b) for a, b in zip(composed, expected, strict=True))

    x, ids, w, gate_up, down, gate_up_bias, down_bias = args
    flipped = {**options, "transposed": not options.get("transposed", False)}
    found = gradients(lambda *a: fused(*a, **flipped), (x, ids, w, gate_up.mT, down.mT, gate_up_bias, down_bias))
    found[3:5] = [g.mT for g in found[3:5]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    if options.get("gated", True) and not options.get("interleaved"):
        dim = 2 if options.get("transposed") else 1

        def alternate(t: Tensor, d: int) -> Tensor:
            return torch.stack(t.chunk(2, d), d + 1).flatten(d, d + 1)

        def separate(t: Tensor, d: int) -> Tensor:
            return torch.cat(t.unflatten(d, (-1, 2)).unbind(d + 1), d)

        bias = None if gate_up_bias is None else alternate(gate_up_bias, 1)
        other = {**options, "interleaved": True}
        found = gradients(lambda *a: fused(*a, **other), (x, ids, w, alternate(gate_up, dim), down, bias, down_bias))
        found[3] = separate(found[3], dim)
        if bias is not None:
            found[5] = separate(found[5], 1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The others have too few numbers to compare two random errors.
@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("no_tokens", "all_dropped", "single_token", "tiny_bias")])
def test_composed_gradients_obey_the_error_rule(name: str) -> None:
    args, options = inputs(name, torch.bfloat16)
    double = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    def through(function: Callable[..., Tensor], values: tuple[Any, ...], **path: str) -> list[Tensor]:
        return gradients(lambda *a: function(*a[:3], as_data(a, options)[1], as_data(a, options)[2], **path), values)

    new = through(grouped_experts, args, path="composed")
    plain, truth = through(reference.grouped_experts, args), through(reference.grouped_experts, double)
    for i, (n, p, t) in enumerate(zip(new, plain, truth, strict=True)):
        assert_accurate(n, p, t, f"tensor {i}")


def test_leading_dimensions_and_routing_of_any_shape() -> None:
    args, options = inputs("default", torch.float32)
    routing, weights, spec = as_data(args, options)
    x, ids, w = (t[:16] for t in routing)
    flat = grouped_experts(x, ids, w, weights, spec)
    for shape in ((2, 8), (2, 4, 2)):
        found = grouped_experts(x.unflatten(0, shape), ids.unflatten(0, shape), w.unflatten(0, shape), weights, spec)
        assert torch.equal(found, flat.unflatten(0, shape))


def test_path_errors() -> None:
    args, options = inputs("default", torch.float32)
    routing, weights, _ = as_data(args, options)
    with pytest.raises(ValueError, match="path='fast' is not one of 'auto', 'fused', 'composed'"):
        grouped_experts(*routing, weights, path="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path='fused' cannot run a gate_fn or a post_norm; use path='auto' or 'composed'"):
        grouped_experts(*routing, weights, ExpertSpec(gate_fn=lambda p: p.chunk(2, -1)[0]), path="fused")


@pytest.mark.parametrize("is_list", [False, True])
def test_gate_fn_and_post_norm_take_the_composed_path(is_list: bool) -> None:
    build = layer(bias=True, ids="dropped")
    args, options = (listed(build) if is_list else build)(Maker(torch.float64, "hooks", integers=True))
    routing, weights, _ = as_data(args, options, is_list)
    spec = ExpertSpec(gate_fn=lambda p: p.chunk(2, -1)[0] - p.chunk(2, -1)[1], post_norm=lambda y: 3 * y)
    assert torch.equal(grouped_experts(*routing, weights, spec), reference.grouped_experts(*routing, weights, spec))


# ---- only what is needed
SUBSETS = [s for n in range(7) for s in itertools.combinations(range(6), n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_exactly_the_needed_gradients_are_computed(dtype: torch.dtype) -> None:
    """All 64 subsets: the mask, the number of results, their bits, what is kept for the backward."""
    args, options = layer(bias=True, ids="dropped")(Maker(dtype, "subsets"))
    everything = gradients(lambda *a: fused(*a, **options), args)
    for subset in SUBSETS:
        leaves = list(args)
        for i in subset:
            leaves[POSITIONS[i]] = args[POSITIONS[i]].detach().requires_grad_()
        with Recorder() as recorder:
            out, kept = saved_by(lambda leaves=leaves: fused(*leaves, **options))
            if not subset:
                assert recorder.moe_ops == ["grouped_forward.default"] and not kept and out.grad_fn is None
                continue
            grads = torch.autograd.grad(out, [leaves[POSITIONS[i]] for i in subset], torch.ones_like(out))
        assert recorder.moe_ops == ["_grouped_forward_train.default", "_grouped_backward.default"], subset
        _, options_seen, results = next(c for c in recorder.calls if "_grouped_backward" in c[0])
        assert options_seen["needs"] == sum(BITS[i] for i in subset) and len(results) == len(subset)
        needs_x = 2 in subset  # only dW of the up projection reads x
        assert any(t.data_ptr() == args[0].data_ptr() for t in kept) == needs_x, subset
        assert all(t.shape != args[0].shape for t in kept) or needs_x
        assert grads[0] is not None
    full = gradients(lambda *a: fused(*a, **options), args)
    for i in range(6):  # one at a time gives the bits of all at once
        (_, alone) = gradients(lambda *a: fused(*a, **options), args, (POSITIONS[i],))
        assert torch.equal(alone, everything[1 + i]) and torch.equal(full[1 + i], everything[1 + i])


@pytest.mark.parametrize("name", ["default", "ungated_relu2"])
def test_needed_gradients_of_lists(name: str) -> None:
    args, options = listed(LAYERS[name])(Maker(torch.float32, name))
    gated = options.get("gated", True)
    bits = {0: Needs.HIDDEN_STATES, 2: Needs.TOP_K_WEIGHTS, 3: Needs.GATE_UP, 4: Needs.UP, 5: Needs.DOWN}
    for position, bit in bits.items():
        if position == 3 and not gated:
            continue
        # One expert's matrix suffices: the gradients of the others come along and are dropped.
        leaves = [list(a) if isinstance(a, list) else a for a in args]
        target = leaves[position][2] if isinstance(leaves[position], list) else leaves[position]
        leaf = target.detach().requires_grad_()
        if isinstance(leaves[position], list):
            leaves[position][2] = leaf
        else:
            leaves[position] = leaf
        with Recorder() as recorder:
            out, kept = saved_by(lambda leaves=leaves: fused_list(*leaves, **options))
            (grad,) = torch.autograd.grad(out.sum(), leaf)
        assert next(c[1] for c in recorder.calls if "_grouped_backward" in c[0])["needs"] == bit
        assert any(t.data_ptr() == args[0].data_ptr() for t in kept) == (position in (3, 4))
        assert grad.shape == leaf.shape and grad.any()


def _largest_allocation(function: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max((e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), default=0)


def test_frozen_weights_do_not_allocate_their_gradient() -> None:
    args, options = layer(T=2, K=1, E=64, H=64, I=64)(Maker(torch.float32, "memory"))
    one_weight = min(args[3].nbytes, args[4].nbytes)
    x = args[0].detach().requires_grad_()
    frozen = fused(x, *args[1:], **options)
    assert _largest_allocation(lambda: torch.autograd.grad(frozen, x, torch.ones_like(frozen))) < one_weight
    down = args[4].detach().requires_grad_()
    trained = fused(*args[:4], down, *args[5:], **options)
    seen = _largest_allocation(lambda: torch.autograd.grad(trained, down, torch.ones_like(trained)))
    assert seen == down.nbytes  # the profiler does see it, and nothing larger: not dW of the other projection


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_list", [False, True])
def test_without_gradients_nothing_is_kept(mode: Any, is_list: bool) -> None:
    build = LAYERS["default"]
    args, options = (listed(build) if is_list else build)(Maker(torch.float32, "no_grad"))
    args = (args[0].requires_grad_(), *args[1:])
    with mode(), Recorder() as recorder:
        out, kept = saved_by(lambda: (fused_list if is_list else fused)(*args, **options))
    assert recorder.moe_ops == ["grouped_forward.list" if is_list else "grouped_forward.default"]
    assert not kept and out.grad_fn is None and len(recorder.calls) == 1


def test_experts_without_tokens_are_neither_read_nor_given_a_gradient(dtype: torch.dtype) -> None:
    args, options = layer(bias=True, ids="sparse")(Maker(dtype, "sparse"))
    unused = [e for e in range(6) if e not in args[1]]
    assert len(unused) >= 3
    for t in args[3:]:
        t[unused] = float("nan")
    out, dx, dw, *rest = gradients(lambda *a: fused(*a, **options), args)
    assert all(t.isfinite().all() for t in (out, dx, dw, *rest))
    assert not any(t[unused].any() for t in rest)


def test_a_dropped_slot_reaches_nothing(dtype: torch.dtype) -> None:
    """Its routing weight may be NaN; its gradient is zero; a token whose slots are all dropped comes out as zero."""
    args, options = layer(T=6, K=2, bias=True, activation="relu")(Maker(dtype, "dropped", integers=True))
    x, ids, w, *weights = args
    ids[0, 0], ids[3] = 6, torch.tensor([-1, 77])
    w[0, 0] = float("nan")
    out, dx, dw, *_ = gradients(lambda *a: fused(*a, **options), args)
    assert out.isfinite().all() and dx.isfinite().all() and not out[3].any() and not dx[3].any()
    assert dw[0, 0] == 0 and not dw[3].any()
    kept = fused(x[:1], ids[:1, 1:], w[:1, 1:], *weights, **options)
    assert torch.equal(out[:1], kept)


# ---- errors
E, H, I, T, K = 3, 4, 5, 2, 2  # noqa: E741
GOOD: dict[str, Any] = {
    "hidden_states": torch.zeros(T, H), "top_k_index": torch.zeros(T, K, dtype=torch.int64), "top_k_weights": torch.zeros(T, K),
    "gate_up_proj": torch.zeros(E, 2 * I, H), "down_proj": torch.zeros(E, H, I),
    "gate_up_bias": torch.zeros(E, 2 * I), "down_bias": torch.zeros(E, H),
}  # fmt: skip
BAD: list[tuple[dict[str, Any], str]] = [
    ({"hidden_states": torch.zeros(T, 1, H)}, r"hidden_states has shape \[2, 1, 4\], expected \[T, H\]"),
    ({"hidden_states": torch.zeros(T, 6)}, r"gate_up_proj has shape \[3, 10, 4\]: its experts take 4 inputs but hidden_states has H=6"),
    ({"hidden_states": torch.zeros(T, H, dtype=torch.int64)}, "gate_up_proj is float32 but hidden_states is int64"),
    ({"hidden_states": torch.zeros(T, H).double()}, "gate_up_proj is float32 but hidden_states is float64; cast one of them"),
    ({"top_k_index": torch.zeros(3, K, dtype=torch.int64)}, r"top_k_index has shape \[3, 2\], expected \[T=2, K\] with K >= 1"),
    ({"top_k_index": torch.zeros(T, 0, dtype=torch.int64)}, r"top_k_index has shape \[2, 0\], expected \[T=2, K\] with K >= 1"),
    ({"top_k_index": torch.zeros(T, K)}, "top_k_index is float32, expected int32 or int64"),
    ({"top_k_weights": torch.zeros(T, 1)}, r"top_k_weights has shape \[2, 1\], expected \[2, 2\]"),
    ({"top_k_weights": torch.zeros(T, K, dtype=torch.int64)}, "top_k_weights is int64; float64, float32, bfloat16 and float16"),
    ({"gate_up_proj": torch.zeros(2 * I, H)}, r"gate_up_proj has shape \[10, 4\], expected \[E, 2I, H\]"),
    ({"gate_up_proj": torch.zeros(E, 9, H)}, r"gate_up_proj has shape \[3, 9, 4\]: gated=True needs 2I outputs, not 9"),
    ({"gate_up_proj": torch.zeros(0, 2 * I, H)}, r"gate_up_proj has shape \[0, 10, 4\]: there are no experts"),
    ({"down_proj": torch.zeros(E - 1, H, I)}, r"down_proj has shape \[2, 4, 5\], expected 3 experts of 5 inputs and 4 outputs"),
    ({"down_proj": torch.zeros(E, I, H)}, r"down_proj has shape \[3, 5, 4\], expected 3 experts of 5 inputs and 4 outputs"),
    ({"down_proj": torch.zeros(E, H, I).half()}, "down_proj is float16 but hidden_states is float32"),
    ({"gate_up_bias": torch.zeros(E, I)}, r"gate_up_bias has shape \[3, 5\], expected \[3, 10\]"),
    ({"down_bias": torch.zeros(H)}, r"down_bias has shape \[4\], expected \[3, 4\]"),
    ({"down_bias": torch.zeros(E, H).bfloat16()}, "down_bias is bfloat16 but hidden_states is float32"),
    ({"activation": "swish"}, "activation='swish' is not known; choose one of silu, gelu, gelu_tanh, relu, relu2, swigluoai"),
    ({"gated": False, "limit": 1.0}, "limit=1 needs gated=True and a positive value"),
    ({"transposed": True}, r"\[3, 10, 4\] with transposed=True: its experts take 10 inputs but hidden_states has H=4"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("training", [False, True])
def test_errors_have_the_values_and_nothing_is_computed(change: dict[str, Any], message: str, training: bool) -> None:
    args = dict(GOOD)
    torch.ops.moe.grouped_forward(*args.values())
    options = {k: v for k, v in change.items() if k not in GOOD}
    args |= {k: v for k, v in change.items() if k in GOOD}
    args["down_bias"] = args["down_bias"].detach().requires_grad_(training)
    grown = []

    def call() -> None:
        with pytest.raises(RuntimeError, match=f"moe(_ext)?::(grouped_forward|sort_by_expert): .*({message})"):
            torch.ops.moe.grouped_forward(*args.values(), **options)
        grown.append(True)

    assert _largest_allocation(call) < 64 and grown  # bytes: not even one row


def test_meta_tensors_give_shapes_and_mixed_devices_an_error() -> None:
    on_meta = {k: v.to("meta") for k, v in GOOD.items()}
    assert torch.ops.moe.grouped_forward(*on_meta.values()).shape == (T, H)
    for name in GOOD:  # one offloaded tensor: an error, not memory that nobody filled
        with pytest.raises(RuntimeError, match="moe::grouped_forward: the tensors are on different devices: cpu, meta"):
            torch.ops.moe.grouped_forward(*(GOOD | {name: on_meta[name]}).values())
    weights = [torch.zeros(5, 4), torch.zeros(5, 4, device="meta")]
    with pytest.raises(RuntimeError, match="moe_ext::grouped_mm: the tensors are on different devices: cpu, meta"):
        ops.grouped_mm(torch.zeros(2, 4), weights, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": []}, "gate_proj has 0 entries for 3 experts"),
        ({"up": []}, "up_proj is empty: there are no experts"),
        ({"down": [torch.zeros(H, I)] * 2}, "down_proj has 2 entries for 3 experts"),
        ({"down": [torch.zeros(H, I)] * 2 + [torch.zeros(H, 6)]}, r"down_proj has shape \[4, 6\], expected \[4, 5\]"),
        ({"up": [torch.zeros(I, H)] * 2 + [torch.zeros(I, H).half()]}, "up_proj is float16 but hidden_states is float32"),
        ({"down_bias": [torch.zeros(H)]}, "down_bias has 1 entries for 3 experts"),
    ],
)
def test_list_errors_have_the_values(change: dict[str, Any], message: str) -> None:
    args = {"x": GOOD["hidden_states"], "ids": GOOD["top_k_index"], "w": GOOD["top_k_weights"], "gate": [torch.zeros(I, H)] * E,
            "up": [torch.zeros(I, H)] * E, "down": [torch.zeros(H, I)] * E, "gb": None, "ub": None, "down_bias": None}  # fmt: skip
    fused_list(*args.values())
    with pytest.raises(RuntimeError, match=f"moe::grouped_forward: {message}"):
        fused_list(*(args | change).values())


@pytest.mark.parametrize("path", ["fused", "composed"])
def test_rounding_errors_do_not_grow_with_the_rows_of_an_expert(path: str) -> None:
    # Gradients of weights and biases are sums over rows: one long chain of float32 additions would lose several bits here.
    generator = torch.Generator().manual_seed(0)
    tokens, top_k, experts, inner, hidden = 16384, 2, 4, 24, 32
    shapes = (
        (tokens, hidden),
        (tokens, top_k),
        (experts, 2 * inner, hidden),
        (experts, hidden, inner),
        (experts, 2 * inner),
        (experts, hidden),
    )
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    grad = torch.randn(tokens, hidden, generator=generator)

    def gradients(compute: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, w, gate_up, down, gate_up_bias, down_bias = inputs = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        weights = ExpertWeights(gate_up_proj=gate_up, down_proj=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return torch.autograd.grad(compute(x, index, w, weights, ExpertSpec()), inputs, grad.to(dtype))

    new = gradients(lambda *args: grouped_experts(*args, path=path), torch.float32)
    plain, truth = (gradients(reference.grouped_experts, dtype) for dtype in (torch.float32, torch.float64))
    for n, p, t, what in zip(new, plain, truth, ("x", "w", "gate_up", "down", "gate_up_bias", "down_bias"), strict=True):
        assert_accurate(n, p, t, f"gradient of {what}")

"""Every op and overload of `torch.ops.moe` and `torch.ops.moe_ext`: its function in plain_ops.py, what is differentiable, and cases.

A case is a small builder that gets a `Maker` (dtype, seed, integer-valued or not) and returns the arguments of one call. With
integer values every sum is exact, so any order of summation, layout or blocking must give the same bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_ext._needs import Needs
from tests.helpers import plain_ops as plain


# ---- making inputs
class Maker:
    """Tensors of one dtype from one seed. `integers`: float tensors hold small whole numbers."""

    def __init__(self, dtype: torch.dtype, seed: str = "", integers: bool = False, device: str = "cpu") -> None:
        self.dtype, self.integers, self.device = dtype, integers, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def floats(self, *shape: int, fan_in: int = 1) -> Tensor:
        """Normal values of variance 1 / fan_in, or whole numbers from -2 to 2."""
        if self.integers:
            return torch.randint(-2, 3, shape, generator=self.generator).to(self.device, self.dtype)
        return (torch.randn(shape, generator=self.generator) / fan_in**0.5).to(self.device, self.dtype)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype).to(self.device)

    def routing_weights(self, *shape: int) -> Tensor:
        if self.integers:
            return self.ints(1, 4, *shape).to(self.dtype)
        return torch.rand(shape, generator=self.generator).to(self.device, self.dtype)

    def ids(self, kind: str, T: int, K: int, E: int, dtype: torch.dtype) -> Tensor:
        """random; dropped: some outside [0, E); one: all to one expert; repeated: one expert per token, K times; sparse: every
        second expert; all: each token to K different experts."""
        if kind == "dropped":
            return self.ints(-2, E + 2, T, K, dtype=dtype)
        if kind == "one":
            return torch.full((T, K), E // 2, dtype=dtype, device=self.device)
        if kind == "repeated":
            return self.ints(0, E, T, 1, dtype=dtype).repeat(1, K)
        if kind == "sparse":
            return self.ints(0, (E + 1) // 2, T, K, dtype=dtype) * 2
        if kind == "all":
            return torch.rand(T, E, generator=self.generator).argsort(1)[:, :K].to(self.device, dtype)
        return self.ints(0, E, T, K, dtype=dtype)


def spread(t: Tensor, dim: int = -1) -> Tensor:
    """The same values as a view with stride 2 along `dim`, NaN between them."""
    dim = dim % t.dim()
    size = list(t.shape)
    size[dim] *= 2
    wide = torch.full(size, float("nan") if t.is_floating_point() else 0, dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(t.dim()))]
    return view.copy_(t)


# ---- cases
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Build = Callable[[Maker], Inputs]


def layer(
    T: int = 17, K: int = 3, E: int = 6, H: int = 24, I: int = 20, *, ids: str = "random", int_dtype: torch.dtype = torch.int64,  # noqa: E741
    bias: bool = False, strided: bool = False, expanded: bool = False, weights_dtype: torch.dtype | None = None, **options: Any,
) -> Build:  # fmt: skip
    """Arguments of grouped_forward. strided: no input is contiguous; expanded: the experts share one matrix through stride 0."""

    def build(m: Maker) -> Inputs:
        width = I * (2 if options.get("gated", True) else 1)
        x, w = m.floats(T, H), m.routing_weights(T, K)
        top_k_index = m.ids(ids, T, K, E, int_dtype)
        gate_up, down = m.floats(E, width, H, fan_in=H), m.floats(E, H, I, fan_in=I)
        if options.get("transposed"):
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        biases: tuple[Tensor | None, ...] = (m.floats(E, width), m.floats(E, H)) if bias else (None, None)
        if strided:
            x, w, top_k_index = spread(x), spread(w, 0), spread(top_k_index)
            gate_up, down = spread(gate_up, 1), spread(down.mT, 1).mT
            biases = tuple(None if b is None else spread(b, 0) for b in biases)
        if expanded:
            gate_up, down = gate_up[:1].expand(E, -1, -1), down[:1].expand(E, -1, -1)
            biases = tuple(None if b is None else b[:1].expand(E, -1) for b in biases)
        return (x, top_k_index, w if weights_dtype is None else w.to(weights_dtype), gate_up, down, *biases), options

    return build


def listed(build: Build) -> Build:
    """The arguments of grouped_forward as those of its list overload, over views of the same tensors."""

    def built(m: Maker) -> Inputs:
        (x, ids, w, gate_up, down, gate_up_bias, down_bias), options = build(m)
        gated = options.get("gated", True)

        def halves(t: Tensor | None) -> tuple[Any, Any]:
            if t is None:
                return None, None
            if not gated:
                return [], list(t.unbind())
            gate, up = t.chunk(2, 1)
            return list(gate.unbind()), list(up.unbind())

        (gate, up), (gate_bias, up_bias) = halves(gate_up), halves(gate_up_bias)
        gate_bias = gate_bias or None  # an ungated list has no gate bias
        down_biases = None if down_bias is None else list(down_bias.unbind())
        return (x, ids, w, gate, up, list(down.unbind()), gate_bias, up_bias, down_biases), options

    return built


def backward_of(build: Build, needs: Needs, is_list: bool = False, recompute: bool = False) -> Build:
    """Arguments of the backward of a layer, with what its training forward saves."""

    def built(m: Maker) -> Inputs:
        args, options = (listed(build) if is_list else build)(m)
        x, ids, w = args[:3]
        train = plain.grouped_forward_train_list if is_list else plain.grouped_forward_train
        _, pre_act, *maps = train(*args, **options)
        kept_x = x if recompute or needs & (Needs.GATE_UP | Needs.UP) else None
        full = {"activation": "silu", "gated": True, "alpha": None, "limit": None}
        full |= {} if is_list else {"transposed": False, "interleaved": False}
        return (m.floats(*x.shape), kept_x, w, None if recompute else pre_act, *maps, *args[3:]), full | options | {"needs": int(needs)}

    return built


def _routed(m: Maker, T: int, K: int, E: int, ids: str = "dropped") -> tuple[Tensor, Tensor, Tensor]:
    return plain.sort_by_expert(m.ids(ids, T, K, E, torch.int64), E)


def rows_case(op: str, T: int = 13, K: int = 3, E: int = 5, H: int = 24, *, ids: str = "dropped", weighted: bool = False) -> Build:
    """permute, unpermute and unpermute_backward."""

    def build(m: Maker) -> Inputs:
        _, r2s, s2r = _routed(m, T, K, E, ids)
        w = m.routing_weights(T, K)
        if op == "permute":
            return (m.floats(T, H), r2s, s2r, K), {}
        if op == "unpermute":
            return (m.floats(T * K, H), r2s, s2r, K, w if weighted else None), {}
        return (m.floats(T, H), m.floats(T * K, H), r2s, w), {}

    return build


def mm_case(
    op: str, T: int = 20, K: int = 2, E: int = 4, inputs: int = 24, outputs: int = 20, *, bias: bool = False, transposed: bool = False,
    ids: str = "dropped",
) -> Build:  # fmt: skip
    """grouped_mm, grouped_mm_wgrad, grouped_bias_grad, stacked or listed (op ends in .list)."""

    def build(m: Maker) -> Inputs:
        offsets, _, _ = _routed(m, T, K, E, ids)
        x = m.floats(T * K, inputs)
        if op.startswith("grouped_mm_wgrad"):
            return (x, m.floats(T * K, outputs), offsets), {}
        if op == "grouped_bias_grad":
            return (x, offsets), {}
        weight = m.floats(E, *((inputs, outputs) if transposed else (outputs, inputs)), fan_in=inputs)
        b = m.floats(E, outputs) if bias else None
        if op.endswith(".list"):
            return (x, list(weight.unbind()), offsets, None if b is None else list(b.unbind())), {"transposed": transposed}
        return (x, weight, offsets, b), {"transposed": transposed}

    return build


def ids_case(kind: str, dtype: torch.dtype) -> Build:
    """sort_by_expert."""
    return lambda m: ((m.ids(kind, 33, 4, 7, dtype), 7), {})


def activation_case(backward: bool = False, S: int = 12, I: int = 20, **options: Any) -> Build:  # noqa: E741
    def build(m: Maker) -> Inputs:
        pre_act = m.floats(S, I * (2 if options.get("gated", True) else 1))
        return ((m.floats(S, I), pre_act) if backward else (pre_act,)), options

    return build


OAI: dict[str, Any] = {"activation": "swigluoai", "alpha": 1.702, "limit": 1.0}
GPT_OSS: dict[str, Any] = {**OAI, "transposed": True, "interleaved": True, "bias": True}
TINY: dict[str, Any] = {"T": 4, "K": 2, "E": 3, "H": 5, "I": 3}
ALL_STACKED = Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS | Needs.GATE_UP | Needs.DOWN | Needs.GATE_UP_BIAS | Needs.DOWN_BIAS
ALL_LISTED = ALL_STACKED | Needs.UP | Needs.UP_BIAS
UNGATED = ALL_LISTED & ~(Needs.GATE_UP | Needs.GATE_UP_BIAS)

LAYERS: dict[str, Build] = {
    "default": layer(),
    "tiny_bias": layer(**TINY, bias=True, ids="dropped"),
    "gpt_oss": layer(**GPT_OSS),
    "clamped_silu": layer(limit=0.5),
    "gelu": layer(activation="gelu", bias=True, ids="sparse"),
    "gelu_tanh": layer(activation="gelu_tanh", transposed=True),
    "relu": layer(activation="relu", interleaved=True),
    "ungated_relu2": layer(activation="relu2", gated=False, bias=True, ids="dropped", int_dtype=torch.int32),
    "relu_transposed_bias": layer(activation="relu", transposed=True, bias=True, ids="dropped"),
    "strided": layer(bias=True, strided=True),
    "expanded": layer(activation="relu2", bias=True, expanded=True),
    "one_expert_of_many": layer(T=40, K=2, ids="one"),
    "repeated_expert": layer(ids="repeated"),
    "k_is_e": layer(K=4, E=4, ids="all"),
    "k_is_1": layer(K=1, int_dtype=torch.int32),
    "single_token": layer(T=1),
    "no_tokens": layer(T=0, bias=True),
    "all_dropped": layer(E=1, ids="dropped", T=4, K=1),
    "float32_routing": layer(weights_dtype=torch.float32),
    "long": layer(T=70, K=2, E=2, H=40, I=36, bias=True),
}
STACKED_ONLY = {"gpt_oss", "gelu_tanh", "relu", "relu_transposed_bias"}  # transposed or interleaved
LISTS = {name: listed(build) for name, build in LAYERS.items() if name not in STACKED_ONLY}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {}, "gelu": {"activation": "gelu"}, "gelu_tanh": {"activation": "gelu_tanh"}, "relu": {"activation": "relu"},
    "relu2": {"activation": "relu2"}, "swigluoai": {"activation": "swigluoai", "alpha": 1.5}, "gpt_oss": {**OAI, "interleaved": True},
    "clamped_silu": {"limit": 0.5}, "interleaved_silu": {"interleaved": True},
    **{f"ungated_{a}": {"activation": a, "gated": False} for a in ("silu", "gelu", "gelu_tanh", "relu", "relu2")},
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    """reference: the same signature in plain PyTorch. differentiable: positions of arguments that gradients flow to."""

    reference: Callable[..., Any]
    differentiable: tuple[int, ...] = ()
    cases: dict[str, Build] = field(default_factory=dict)


def _mm_cases(op: str) -> dict[str, Build]:
    return {
        "default": mm_case(op), "bias": mm_case(op, bias=True), "transposed": mm_case(op, transposed=True, bias=True),
        "long": mm_case(op, T=60, E=2), "no_rows": mm_case(op, T=0),
    }  # fmt: skip


OPS: dict[str, Op] = {
    "grouped_forward": Op(plain.grouped_forward, (0, 2, 3, 4, 5, 6), LAYERS),
    "grouped_forward.list": Op(plain.grouped_forward_list, (0, 2, 3, 4, 5, 6, 7, 8), LISTS),
    "sort_by_expert": Op(plain.sort_by_expert, (), {
        f"{kind}_{str(d).removeprefix('torch.')}": ids_case(kind, d)
        for kind, d in (("random", torch.int64), ("dropped", torch.int32), ("sparse", torch.int64), ("one", torch.int32))
    }),
    "permute": Op(plain.permute, (0,), {"default": rows_case("permute"), "no_rows": rows_case("permute", T=0)}),
    "unpermute": Op(plain.unpermute, (0, 4), {
        "weighted": rows_case("unpermute", weighted=True), "plain": rows_case("unpermute"),
        "no_rows": rows_case("unpermute", T=0, weighted=True),
    }),
    "unpermute_backward": Op(plain.unpermute_backward, (), {
        "default": rows_case("unpermute_backward"), "odd": rows_case("unpermute_backward", H=37),
    }),
    "grouped_mm": Op(plain.grouped_mm, (0, 1, 3), _mm_cases("grouped_mm")),
    "grouped_mm.list": Op(plain.grouped_mm, (0, 1, 3), _mm_cases("grouped_mm.list")),
    "grouped_mm_wgrad": Op(plain.grouped_mm_wgrad, (0, 1), {
        "default": mm_case("grouped_mm_wgrad"), "sparse": mm_case("grouped_mm_wgrad", ids="sparse"),
        "no_rows": mm_case("grouped_mm_wgrad", T=0),
    }),
    "grouped_mm_wgrad.list": Op(plain.grouped_mm_wgrad_list, (), {"default": mm_case("grouped_mm_wgrad.list")}),
    "grouped_bias_grad": Op(plain.grouped_bias_grad, (), {"default": mm_case("grouped_bias_grad")}),
    "gated_activation": Op(plain.gated_activation, (0,), {name: activation_case(**options) for name, options in ACTIVATIONS.items()}),
    "gated_activation_backward": Op(plain.gated_activation_backward, (), {
        name: activation_case(backward=True, **options) for name, options in ACTIVATIONS.items()
    }),
    "_grouped_forward_train": Op(plain.grouped_forward_train, (), {name: LAYERS[name] for name in ("default", "gpt_oss", "ungated_relu2")}),
    "_grouped_forward_train.list": Op(plain.grouped_forward_train_list, (), {name: LISTS[name] for name in ("default", "ungated_relu2")}),
    "_grouped_backward": Op(plain.grouped_backward, (), {
        "all": backward_of(layer(bias=True, ids="dropped"), ALL_STACKED), "gpt_oss": backward_of(layer(**GPT_OSS), ALL_STACKED),
        "frozen": backward_of(layer(), Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS),
        "recompute": backward_of(layer(bias=True, ids="dropped"), ALL_STACKED, recompute=True),
    }),
    "_grouped_backward.list": Op(plain.grouped_backward_list, (), {
        "all": backward_of(layer(bias=True, ids="dropped"), ALL_LISTED, is_list=True),
        "ungated": backward_of(layer(activation="relu2", gated=False, bias=True), UNGATED, is_list=True),
        "frozen": backward_of(layer(), Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS, is_list=True),
        "recompute": backward_of(layer(bias=True, ids="dropped"), Needs.HIDDEN_STATES, is_list=True, recompute=True),
    }),
}  # fmt: skip


# ---- using it
@dataclass(frozen=True)
class Case:
    """One op of the table with one of its builders."""

    op: str
    label: str

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def entry(self) -> Op:
        return OPS[self.op]

    @property
    def function(self) -> Any:
        packet, _, overload = self.op.partition(".")
        return getattr(getattr(torch.ops.moe if packet == "grouped_forward" else torch.ops.moe_ext, packet), overload or "default")

    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        return self.entry.cases[self.label](Maker(dtype, f"{self}/{draw}", integers))

    def with_leaves(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same arguments, the differentiable ones as leaves that require a gradient; strides stay."""

        def leaf(t: Any) -> Any:
            return [leaf(x) for x in t] if isinstance(t, list) else None if t is None else t.detach().requires_grad_()

        return tuple(leaf(a) if i in self.entry.differentiable else a for i, a in enumerate(args))


CASES = [Case(op, label) for op, entry in OPS.items() for label in entry.cases]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(to_double(v) for v in value) if isinstance(value, (tuple, list)) else value


def results_and_gradients(case: Case, function: Callable[..., Any], args: Any, kwargs: Any, seed: str = "grad") -> list[Tensor]:
    """Results, then the gradient of each differentiable argument for a random gradient of the first result, the same in each call."""
    args = case.with_leaves(args)
    leaves = [t for t in tensors(list(args)) if t.requires_grad]
    results = tensors(function(*args, **kwargs))
    if not leaves:
        return results
    integers = bool((args[0] == args[0].round()).all())
    grad = Maker(torch.float32, seed, integers).floats(*results[0].shape).bfloat16().to(results[0])
    if not results[0].requires_grad:  # the reference, when no token reaches an expert
        return [r.detach() for r in results] + [torch.zeros_like(leaf) for leaf in leaves]
    return [r.detach() for r in results] + list(torch.autograd.grad(results[0], leaves, grad, allow_unused=True, materialize_grads=True))

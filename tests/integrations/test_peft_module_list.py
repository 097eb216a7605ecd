"""LoRA of PEFT on experts that are one module each: what our grouped form computes, against PEFT's own layers.

The number of a trap is in the name of its test. Those of stacked experts (T74, T75, T83, T86) are in test_peft_stacked.py, whole
models in test_peft_enable_module_list.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ext import functional, ops, reference
from moe_ext.experts import ExpertSpec, ExpertWeights, Projection
from moe_ext.integrations.run.peft import LoraProjection, LowRank, project, sum_adapters, unwrap
from moe_ext.integrations.usable import Refused
from moe_ext.testing import assert_accurate
from tests.helpers.models import routing
from tests.integrations.adapters import (
    PROJECTIONS,
    ListedExperts,
    Recorder,
    activate,
    assert_all_accurate,
    attach,
    exact_copy,
    factors_of,
    outputs_and_gradients,
    peft,
)

ALL = list(PROJECTIONS)


def experts_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if isinstance(m, ListedExperts))


def build(dtype: torch.dtype = torch.float32, **sizes: int) -> ListedExperts:
    torch.manual_seed(0)
    return ListedExperts(**sizes).to(dtype).requires_grad_(False)


def own(model: nn.Module, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    return experts_of(model)(x, index, w)


def read(model: nn.Module) -> ExpertWeights:
    found = {}
    for name in PROJECTIONS:
        taken = unwrap([getattr(expert, name) for expert in experts_of(model).experts])
        found[name] = project([base.weight for base in taken[0]], taken[1])
    return ExpertWeights(**found)


def by(compute: Callable[..., Tensor], model: nn.Module, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    return compute(x, index, w, read(model), ExpertSpec())


grouped = functools.partial(by, functional.grouped_experts)


def check(model: nn.Module, dtype: torch.dtype) -> None:
    plain, new = outputs_and_gradients(model, own, dtype), outputs_and_gradients(model, grouped, dtype)
    assert_all_accurate(new, plain, outputs_and_gradients(exact_copy(model), own, torch.float64))


def reason_of(model: nn.Module, projection: str = "up_proj") -> str:
    with pytest.raises(Refused) as caught:
        unwrap([getattr(expert, projection) for expert in experts_of(model).experts])
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ what adapters compute
def two_adapters(model: nn.Module, **options: Any) -> Any:
    model = attach(model, target_modules=ALL, **options)
    return attach(model, "other", r=3, lora_alpha=9, target_modules=["up_proj"], **options)


def rescaled(model: nn.Module, **options: Any) -> Any:
    model = attach(model, target_modules=ALL, **options)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scale_layer(0.25)
    layer = experts_of(model).experts[2].up_proj
    layer.set_scale("default", 3.0)
    return model


CASES: dict[str, Callable[..., Any]] = {
    "one": lambda m, **o: attach(m, target_modules=ALL, **o),
    "T76_two_active": lambda m, **o: activate(two_adapters(m, **o), "default", "other"),
    "T76_the_other_active": lambda m, **o: activate(two_adapters(m, **o), "other"),
    "T76_some_experts": lambda m, **o: attach(m, target_modules=r".*experts\.[13]\.(up|down)_proj", **o),
    "T76_different_ranks": lambda m, **o: attach(m, target_modules=ALL, rank_pattern={"experts.1.up_proj": 7, "experts.3.up_proj": 2}, **o),
    "T79_rslora": lambda m, **o: attach(m, target_modules=ALL, use_rslora=True, **o),
    "T79_scaled_by_layer": rescaled,
    "T79_alpha_pattern": lambda m, **o: attach(m, target_modules=ALL, alpha_pattern={r"experts.0.gate_proj": 32}, **o),
    "T82_rank_1": lambda m, **o: attach(m, target_modules=ALL, r=1, lora_alpha=2, **o),
    "T82_rank_6": lambda m, **o: attach(m, target_modules=ALL, r=6, **o),
}


@pytest.mark.tf4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_T73_adapters_compute_what_peft_computes(case: str, dtype: torch.dtype) -> None:
    model = CASES[case](build(dtype))
    if dtype == torch.float64:  # no yardstick is finer: our float64 is the truth
        expected, found = (outputs_and_gradients(model, way, dtype) for way in (own, grouped))
        assert_all_accurate({k: v.float() for k, v in found.items()}, {k: v.float() for k, v in expected.items()}, expected)
    else:
        check(model, dtype)


@pytest.mark.parametrize("cast", [True, False], ids=["float32 factors", "bfloat16 factors"])
def test_T81_factors_of_either_dtype_on_bfloat16_experts(cast: bool) -> None:
    model = attach(build(torch.bfloat16), target_modules=ALL, cast=cast)
    assert {p.dtype for found in factors_of(model).values() for p in found} == {torch.float32 if cast else torch.bfloat16}
    check(model, torch.bfloat16)


def test_T81_the_low_rank_part_is_computed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator).bfloat16()
    a, b = ([torch.randn(*shape, generator=generator) for _ in range(2)] for shape in ((4, 32), (24, 4)))
    adapters = [LowRank(a, b, 0.5), LowRank(b_to_a(b, 32), b, -2.0)]
    offsets = torch.tensor([0, 30, 64], dtype=torch.int32)

    def dense(dtype: torch.dtype) -> Tensor:
        parts = [sum((x.a[e].to(dtype).T @ x.b[e].to(dtype).T) * x.scaling for x in adapters) for e in range(2)]
        return torch.cat([rows[:30].to(dtype) @ parts[0], rows[30:].to(dtype) @ parts[1]])

    new = sum_adapters(rows, offsets, adapters)
    assert_accurate(new, dense(torch.float32), dense(torch.float64))
    base = [torch.randn(24, 32, generator=generator).bfloat16() for _ in range(2)]
    out = ops.grouped_mm(rows, base, offsets)
    assert torch.equal(LoraProjection(base, adapters).grouped_mm(rows, offsets), (new + out).bfloat16())


def b_to_a(b: list[Tensor], width: int) -> list[Tensor]:
    return [torch.cat([m.T, m.T], dim=1)[:, :width].contiguous() for m in b]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reading_a_matrix_gives_pefts_merged_weight(dtype: torch.dtype) -> None:
    model = activate(two_adapters(build(dtype)), "default", "other")
    weights = read(model)
    for name in PROJECTIONS:
        for e, expert in enumerate(experts_of(model).experts):
            layer = exact_copy(getattr(expert, name))
            merged = layer.base_layer.weight + sum(layer.get_delta_weight(adapter) for adapter in layer.lora_A)
            matrix = getattr(weights, name)[e]
            narrow = torch.float32 if dtype == torch.float64 else dtype  # where no yardstick is finer
            assert matrix.dtype == dtype
            assert_accurate(matrix.to(narrow), merged.to(narrow), merged)
    by_formula = functools.partial(by, reference.grouped_experts)
    if dtype == torch.float64:
        found, truth = outputs_and_gradients(model, by_formula, dtype), outputs_and_gradients(model, own, dtype)
        assert_all_accurate({k: v.float() for k, v in found.items()}, {k: v.float() for k, v in truth.items()}, truth)


def test_stacked_bases_either_way_round_and_other_projections_carry_adapters() -> None:
    model = attach(build(), target_modules=["up_proj"])
    listed = read(model).up_proj
    assert isinstance(listed, LoraProjection)
    stack = torch.stack(list(listed.base))
    rows, offsets = torch.randn(20, 32), torch.tensor([0, 3, 3, 9, 18, 20], dtype=torch.int32)
    expected = listed.grouped_mm(rows, offsets)
    exact = torch.cat([part.double() @ matrix(listed, e).T for e, part in enumerate(rows.split([3, 0, 6, 9, 2]))])
    others = (
        LoraProjection(stack, listed.adapters),
        LoraProjection(stack.mT.contiguous(), listed.adapters, transposed=True),
        LoraProjection(_Listed(list(listed.base)), listed.adapters),
    )
    for other in others:
        assert_accurate(other.grouped_mm(rows, offsets), expected, exact)
        assert len(other) == 5 and torch.equal(other[3], listed[3])
    assert {id(t) for t in listed.tensors()} >= {id(t) for t in (*listed.base, *listed.adapters[0].a, *listed.adapters[0].b)}


def matrix(projection: LoraProjection, e: int) -> Tensor:
    """In float64, and without rounding."""
    return projection.base[e].double() + sum(x.b[e].double() @ x.a[e].double() * x.scaling for x in projection.adapters)


class _Listed(Projection):
    """The least that a projection is: what experts in four bits are to adapters on them."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices = matrices

    def __len__(self) -> int:
        return len(self.matrices)

    def grouped_mm(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        return ops.grouped_mm(rows, self.matrices, expert_offsets)

    def __getitem__(self, e: int) -> Tensor:
        return self.matrices[e]

    def tensors(self) -> list[Tensor]:
        return self.matrices


# ------------------------------------------------------------------------------------------------------------------- read at each call
def test_T76_T77_T79_the_state_is_read_at_each_call() -> None:
    model = two_adapters(build())
    activate(model, "default")
    steps: list[Callable[[], Any]] = [
        lambda: activate(model, "other"),
        lambda: activate(model, "default", "other"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model.merge_adapter(["default"]),
        lambda: model.base_model.unmerge_adapter(),
        lambda: experts_of(model).experts[1].up_proj.scaling.update(other=torch.tensor(0.7)),
        lambda: model.delete_adapter("default"),
    ]
    seen = []
    for step in steps:
        step()
        check(model, torch.float32)
        seen.append(outputs_and_gradients(model, grouped, torch.float32)["output"])
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_T77_disabled_and_merged_adapters_leave_plain_weights() -> None:
    model = attach(build(), target_modules=ALL)
    with model.disable_adapter():
        assert read(model).fusable
    model.base_model.merge_adapter()
    weights = read(model)
    assert weights.fusable and weights.up_proj[2] is experts_of(model).experts[2].up_proj.base_layer.weight
    with model.disable_adapter():
        assert "merged and disabled" in reason_of(model)
        own(model, torch.randn(64, 32), *routing(64, 5))  # PEFT's forward takes the adapters out of the weights
        assert read(model).fusable
    assert not read(model).fusable


def test_T78_dropout_counts_in_training_only() -> None:
    model = attach(build(), target_modules=ALL, lora_dropout=0.5)
    assert reason_of(model.train()) == "the adapter layer of expert 0 has dropout on its adapter 'default'"
    check(model.eval(), torch.float32)
    attach(model, "other", r=2, target_modules=["up_proj"])
    check(activate(model.train(), "other"), torch.float32)  # the one with dropout is not active


# ------------------------------------------------------------------------------------------------------------------------- refused
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "T80_dora": (lambda: attach(build(), target_modules=ALL, use_dora=True), "DoRA"),
    "T80_lora_bias": (lambda: attach(build_biased(), target_modules=ALL, lora_bias=True), "a bias"),
    "T84_ia3": (lambda: other_tuner(peft.IA3Config(target_modules=ALL, feedforward_modules=[])), "ia3.layer.Linear"),
    "T84_vera": (lambda: other_tuner(peft.VeraConfig(target_modules=["up_proj"], r=2)), "vera.layer.Linear"),
    "T84_loha": (lambda: other_tuner(peft.LoHaConfig(target_modules=ALL, r=2)), "loha.layer.Linear"),
    "T84_oft": (lambda: other_tuner(peft.OFTConfig(target_modules=["up_proj"], oft_block_size=8)), "oft.layer.Linear"),
    "T84_modules_to_save": (
        lambda: other_tuner(peft.LoraConfig(target_modules=["gate_proj"], modules_to_save=["up_proj"])), "ModulesToSaveWrapper"
    ),
}  # fmt: skip


def build_biased() -> ListedExperts:
    experts = build()
    for expert in experts.experts:
        for name in PROJECTIONS:
            old = getattr(expert, name)
            setattr(expert, name, nn.Linear(old.in_features, old.out_features))
    return experts


def other_tuner(config: Any) -> Any:
    return peft.get_peft_model(build(), config)


@pytest.mark.tf4
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused_with_a_reason(case: str) -> None:
    make, word = REFUSED[case]
    assert word in reason_of(make())


def test_T80_mixed_batches_and_hooks_are_refused_while_they_last() -> None:
    model = attach(build(), target_modules=ALL).eval()
    with model.base_model._enable_peft_forward_hooks(adapter_names=["default", "__base__"]):
        assert "hooks" in reason_of(model)
    layer = experts_of(model).experts[3].up_proj
    for module in (layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = module.register_forward_hook(lambda *_: None)
        assert "expert 3" in reason_of(model) and "hooks" in reason_of(model)
        handle.remove()
    check(model, torch.float32)


def test_T87_an_unknown_layer_of_pefts_is_refused_not_dropped() -> None:
    model = attach(build(), target_modules=ALL)
    layer = experts_of(model).experts[4].up_proj
    layer.__class__ = type("Linear", (type(layer),), {"forward": lambda self, x: self.base_layer(x) * 2})
    assert "expert 4 has a" in reason_of(model) and "no plain LoRA layer" in reason_of(model)
    model = attach(build(), target_modules=ALL)
    inside = experts_of(model).experts[4].up_proj.lora_A
    inside["default"] = nn.Sequential(inside["default"])
    assert "other modules than linear layers" in reason_of(model)


def test_T90_layers_that_are_not_pefts_are_returned_as_they_are() -> None:
    """A module with an attribute `base_layer` is not an adapter for that."""
    layers = [nn.Linear(4, 4), nn.Identity()]
    layers[1].base_layer = layers[0]
    assert unwrap(layers) == (layers, [])


# ----------------------------------------------------------------------------------------------------------------- nothing unneeded
def test_T29_no_dense_sum_and_no_gradient_that_is_not_needed() -> None:
    model = attach(build(), target_modules=ALL)
    for path, p in model.named_parameters():
        if "up_proj.lora_A" in path:
            p.requires_grad_(False)
    index, w = routing(96, 5)
    x = torch.randn(96, 32, requires_grad=True)
    with Recorder() as recorder:
        grouped(model, x, index, w).sum().backward()
    shapes = {tuple(shape) for _, shape in recorder.made}
    assert not shapes & {(24, 32), (32, 24), (5, 24, 32), (5, 32, 24)}, "a dense matrix was made"
    wgrads = [tuple(shape) for op, shape in recorder.made if "wgrad" in op]
    assert sorted(wgrads) == sorted([(4, 32), (24, 4), (24, 4), (4, 24), (32, 4)] * 5)
    for path, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, path


def test_T32_without_gradients_nothing_is_kept() -> None:
    model = attach(build(), target_modules=ALL)
    with torch.no_grad():
        out = grouped(model, torch.randn(8, 32), *routing(8, 5))
    assert out.grad_fn is None
    inference = attach(build(), target_modules=ALL, inference_mode=True)
    assert grouped(inference, torch.randn(8, 32), *routing(8, 5)).grad_fn is None


def test_T29_rows_are_kept_in_their_own_dtype() -> None:
    """For the gradient of A, that is; a float32 copy of bfloat16 rows would be the largest thing kept."""
    adapters = [LowRank(torch.randn(3, 2, 32, requires_grad=True), torch.randn(3, 24, 2), 1.0)]
    rows, offsets = torch.randn(40, 32).bfloat16(), torch.tensor([0, 9, 30, 40], dtype=torch.int32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum_adapters(rows, offsets, adapters).sum()
    assert [t.dtype for t in kept if t.shape == (40, 32)] == [torch.bfloat16]


def test_T37_autocast_computes_as_it_does_for_plain_experts() -> None:
    model = attach(build(), target_modules=ALL)
    x, (index, w) = torch.randn(64, 32), routing(64, 5)
    with torch.autocast("cpu", torch.bfloat16):
        new = grouped(model, x, index, w)
        plain = own(model, x, index, w)
    assert_accurate(new.float(), plain, own(exact_copy(model), x.double(), index, w.double()))


@pytest.mark.tf4
def test_T82_four_bit_layers_keep_their_adapters() -> None:
    """The adapters are those of PEFT's layer, the base is bitsandbytes' module: whoever reads that makes a projection of it."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")
    experts = build(hidden=64, inner=64)
    for expert in experts.experts:
        for name in PROJECTIONS:
            weight = getattr(expert, name).weight
            layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(weight.data, requires_grad=False)
            setattr(expert, name, layer.to("cpu"))
    experts.is_loaded_in_4bit = True
    model = attach(experts, target_modules=ALL).train()
    layers = [expert.up_proj for expert in experts_of(model).experts]
    assert {type(layer).__qualname__ for layer in layers} == {"Linear4bit"} and "peft" in type(layers[0]).__module__
    bases, adapters = unwrap(layers)
    assert bases == [layer.base_layer for layer in layers]
    dense = [bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float() for base in bases]
    projection = project(_Listed(dense), adapters)
    rows, offsets = torch.randn(50, 64), torch.tensor([0, 10, 20, 30, 40, 50], dtype=torch.int32)
    plain = torch.cat([layer(part) for layer, part in zip(layers, rows.split(10), strict=True)])
    truth = torch.cat([part.double() @ matrix(projection, e).T for e, part in enumerate(rows.split(10))])
    assert_accurate(projection.grouped_mm(rows, offsets), plain, truth)

"""4-bit experts at work: how much is dequantized and when, the cache, whole blocks with routing and biases, and whole models.

Tests are called by the traps they are about.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ext import functional
from moe_ext.experts import ExpertWeights
from moe_ext.integrations.run import bitsandbytes as ours
from moe_ext.testing import assert_accurate
from tests.integrations.quantized import (
    COUNTS,
    LOW,
    bitsandbytes,
    check,
    exact_copy,
    experts4bit,
    linear4bit,
    offsets_of,
    pack_for_cpu,
    product_and_gradient,
    quantize,
    random,
    read,
)  # fmt: skip

EXPERT_BYTES = 48 * 64 * 4


class Watch:
    """Counts what bitsandbytes dequantizes, and the dense bytes of it that live at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.alive, self.most = 0, 0, 0
        original = bitsandbytes.functional.dequantize_4bit

        def dequantize(*args: Any, **kwargs: Any) -> Tensor:
            out = original(*args, **kwargs)
            self.calls += 1
            self.alive += out.nbytes
            self.most = max(self.most, self.alive)
            weakref.finalize(out.untyped_storage(), self.free, out.nbytes)
            return out

        monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", dequantize)

    def free(self, size: int) -> None:
        self.alive -= size


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.mark.parametrize("experts", [0, 1, 3])
def test_the_workspace_is_bounded(experts: int, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size that is set, or by one expert where that is larger; a smaller one changes no bits."""
    linears, counts = experts4bit(8, compute=torch.float32), [3, 1, 0, 5, 2, 0, 7, 1]
    rows, grad = random(19, 64), random(19, 48)

    def run() -> tuple[Tensor, Tensor]:
        return product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of(counts)), rows, grad)

    whole = run()
    assert watch.most == 6 * EXPERT_BYTES and watch.calls == 12
    watch.most, watch.calls = 0, 0
    monkeypatch.setattr(ours, "WORKSPACE_BYTES", experts * EXPERT_BYTES + 100)
    assert all(map(torch.equal, run(), whole))
    assert watch.most == max(experts, 1) * EXPERT_BYTES and watch.calls == 12 and watch.alive == 0


def test_experts_without_rows_are_not_read(watch: Watch) -> None:
    linears = experts4bit(4, compute=torch.float32)
    linears[1].weight.quant_state.state2.absmax.fill_(float("nan"))
    out, grad = product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of([2, 0, 1, 0])), random(3, 64), random(3, 48))
    assert watch.calls == 4 and bool(out.isfinite().all()) and bool(grad.isfinite().all())


def test_rows_past_the_last_expert_are_zero_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "WORKSPACE_BYTES", 0)
    linears, rows, grad = experts4bit(3), random(9, 64), random(9, 48)
    rows[5:] = grad[5:] = float("nan")
    found = product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of([2, 3, 0])), rows, grad)
    part = product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of([2, 3, 0])), rows[:5], grad[:5])
    for whole, few in zip(found, part, strict=True):
        assert torch.equal(whole[:5], few) and not whole[5:].any()
    for counts, size in (([0, 0, 0], 4), ([0, 0, 0], 0)):
        nothing = product_and_gradient(lambda x, c=counts: read(linears, x).grouped_mm(x, offsets_of(c)), rows[:size], grad[:size])
        assert nothing[0].shape == (size, 48) and nothing[1].shape == (size, 64) and not any(t.any() for t in nothing)


def test_no_gradient_is_computed_for_rows_that_need_none(watch: Watch) -> None:
    linears = experts4bit(3)
    out = read(linears, random(1, 64)).grouped_mm(random(6, 64), offsets_of([2, 3, 1]))
    assert not out.requires_grad and watch.calls == 3


def test_T35_the_backward_multiplies_with_the_weights_of_the_forward() -> None:
    def gradient(change: Callable[[nn.ModuleList], Any]) -> Tensor:
        linears, leaf = experts4bit(3), random(6, 64).requires_grad_()
        out = read(linears, leaf).grouped_mm(leaf, offsets_of([2, 3, 1]))
        change(linears)
        return torch.autograd.grad(out, leaf, random(6, 48, seed=1))[0]

    expected = gradient(lambda m: None)
    assert torch.equal(gradient(lambda m: quantize(m[1], random(48, 64, seed=7))), expected)  # a merge: another parameter
    for moved in (lambda state: state, lambda state: state.state2):
        assert torch.equal(gradient(lambda m, f=moved: f(m[0].weight.quant_state).__dict__.update(absmax=torch.zeros(48))), expected)
    assert torch.equal(gradient(lambda m: setattr(m[0].weight, "data", torch.zeros(1536, 1, dtype=torch.uint8))), expected)
    for in_place in (lambda m: m[1].weight.copy_(m[2].weight), lambda m: m[1].weight.quant_state.state2.absmax.mul_(2)):
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            gradient(in_place)


def test_T96_compiled_it_computes_the_same() -> None:
    linears, rows, grad = experts4bit(len(COUNTS), compute=torch.float32), random(44, 64), random(44, 48)

    def compute(x: Tensor) -> Tensor:
        return read(linears, x).grouped_mm(x * 2, offsets_of(COUNTS)) + 1

    expected = product_and_gradient(compute, rows, grad)
    assert all(map(torch.equal, product_and_gradient(torch.compile(compute, backend="eager"), rows, grad), expected))


def test_loaded_in_inference_mode() -> None:
    def gradient(linears: nn.ModuleList) -> tuple[Tensor, Tensor]:
        return product_and_gradient(lambda x: read(linears, x).grouped_mm(x, offsets_of([2, 3, 1])), random(6, 64), random(6, 48))

    with torch.inference_mode():
        linears = experts4bit(3)
        out = read(linears, random(1, 64)).grouped_mm(random(6, 64), offsets_of([2, 3, 1]))
    expected = gradient(experts4bit(3))
    assert torch.equal(out, expected[0]) and all(map(torch.equal, gradient(linears), expected))


# ---------------------------------------------------------------------------------------------------------------------- T57: the cache
def merged(linears: Any) -> None:
    quantize(linears[2], random(48, 64, seed=50))


def loaded(linears: Any) -> None:
    linears[2].load_state_dict({"weight": linears[0].state_dict()["weight"]}, strict=False)


def assigned(linears: Any) -> None:
    linears[2].load_state_dict({"weight": linears[0].weight.data.clone()}, strict=False, assign=True)


def edited_behind_the_version(linears: Any) -> None:
    linears[2].weight.data[700] ^= 0x10


def two_top_bits(linears: Any) -> None:
    linears[2].weight.data[[7, 15]] ^= 0x80  # what a sum of 64-bit words does not notice


def words_swapped(linears: Any) -> None:
    words = linears[2].weight.data.view(-1).view(torch.int64)
    words[[3, 90]] = words[[90, 3]]


def same_address(linears: Any) -> None:
    other = linears[0].weight.data.clone()
    linears[2].weight.data.set_(linears[2].weight.data.untyped_storage())
    linears[2].weight.data.view(-1).copy_(other.view(-1))


def requantized_in_place(linears: Any) -> None:
    other = linear4bit(seed=77, quant_type="nf4")
    linears[2].weight.data.copy_(other.weight.data)
    linears[2].weight.quant_state.__dict__.update(other.weight.quant_state.__dict__)


def scales(linears: Any) -> None:
    linears[2].weight.quant_state.absmax.data[5] ^= 3


def scales_of_scales(linears: Any) -> None:
    linears[2].weight.quant_state.state2.absmax.data.mul_(1.5)


def codes_of_scales(linears: Any) -> None:
    linears[2].weight.quant_state.state2.code.data.mul_(0.5)


def offset(linears: Any) -> None:
    linears[2].weight.quant_state.offset.data += 0.25


def another_type(linears: Any) -> None:
    linears[2].weight.quant_state.quant_type = "fp4"


def another_blocksize(linears: Any) -> None:
    state = linears[2].weight.quant_state
    state.blocksize, state.absmax = 128, state.absmax[::2].clone()


def another_compute_dtype(linears: Any) -> None:
    for m in linears:
        m.compute_dtype = torch.bfloat16


CHANGES = (
    merged, loaded, assigned, edited_behind_the_version, two_top_bits, words_swapped, same_address, requantized_in_place, scales,
    scales_of_scales, codes_of_scales, offset, another_type, another_blocksize, another_compute_dtype,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_T57_the_cache_notices(change: Callable[[Any], None], watch: Watch) -> None:
    linears, cache = experts4bit(len(COUNTS), compute=torch.float32, quant_type="nf4"), ours.DenseCache()
    rows, grad = random(44, 64), random(44, 48)

    def run(cache: ours.DenseCache | None) -> tuple[Tensor, Tensor]:
        return product_and_gradient(lambda x: read(linears, x, cache).grouped_mm(x, offsets_of(COUNTS)), rows, grad)

    for _ in range(3):
        before = run(cache)
    assert watch.calls == len(cache) == 4  # once for each expert with rows, the backwards included
    change(linears)
    after, fresh = run(cache), run(None)
    assert all(map(torch.equal, after, fresh)) and not any(map(torch.equal, after, before))


@pytest.mark.parametrize("stored", LOW, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_T57_with_a_cache_the_gradients_are_the_same(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Also where bitsandbytes rounds the weights of the backward otherwise than those of the forward."""
    check(experts4bit(len(COUNTS), compute=dtype, stored=stored), dtype, ours.DenseCache())


def test_T57_moves_and_other_layouts_of_the_same_weights() -> None:
    linears, cache = experts4bit(len(COUNTS), 64, 128, compute=torch.float32), ours.DenseCache()
    check(linears, cache=cache)
    linears.to("cpu", torch.bfloat16)
    linears.half()
    check(linears, cache=cache)
    for m in linears:
        pack_for_cpu(m)
    assert all(torch.equal(cache.dense(m, read(linears).matrix(e), torch.float32), read(linears)[e]) for e, m in enumerate(linears))
    with ours.weights_kept(linears):
        check(linears, cache=cache)


def test_T57_a_cache_belongs_to_its_owner_and_holds_no_module() -> None:
    linears, cache = experts4bit(3), ours.DenseCache()
    read(linears, random(1, 64), cache).grouped_mm(random(6, 64), offsets_of([2, 3, 1]))
    assert [len(c) for c in (cache, copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)))] == [3, 0, 0, 0]
    del linears[1]
    gc.collect()
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0


# ---------------------------------------------------------------------------------------------------------------------- whole blocks
class Expert(nn.Module):
    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (linear4bit(40, 32, seed=10 * seed + i, **options) for i in (1, 2))
        self.down_proj = linear4bit(32, 40, seed=10 * seed + 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def expert_weights(experts: nn.ModuleList, like: Tensor) -> ExpertWeights:
    projections = {name: [getattr(e, name) for e in experts] for name in ("gate_proj", "up_proj", "down_proj")}
    biases = {f"{name[:-5]}_bias": [m.bias for m in modules] for name, modules in projections.items()}
    return ExpertWeights(
        **{name: read(modules, like) for name, modules in projections.items()},
        **{name: found for name, found in biases.items() if found[0] is not None},
    )


def by_loop(experts: nn.ModuleList, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, k = torch.where(index == e)
        if token.numel():
            out = out.index_add(0, token, (expert(x[token]) * weights[token, k, None]).to(x.dtype))
    return out


def check_block(experts: nn.ModuleList, dtype: torch.dtype) -> None:
    """Output and gradients of hidden states, routing weights and biases."""
    x, weights = random(24, 32, dtype=dtype), random(24, 2, dtype=dtype, seed=1).sigmoid()
    index, grad = torch.rand(24, len(experts)).argsort(dim=1)[:, :2], random(24, 32, dtype=dtype, seed=2)

    def run(compute: Callable[..., Tensor], experts: nn.ModuleList, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, weights)]
        biases = [p for name, p in experts.named_parameters() if name.endswith("bias")]
        out = compute(experts, leaves[0], index, leaves[1])
        grads = torch.autograd.grad(out, [*leaves, *biases], grad.to(dtype), allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(biases, grads[2:], strict=True)]
        return [out.detach(), *grads[:2], *([torch.cat(flat).to(dtype)] if flat else [])]

    exact = exact_copy(experts)
    for parameter in exact.parameters():
        parameter.requires_grad_()
    new = run(lambda e, a, i, w: functional.grouped_experts(a, i, w, expert_weights(e, a)), copy.deepcopy(experts), dtype)
    plain, truth = run(by_loop, copy.deepcopy(experts), dtype), run(by_loop, exact, torch.float64)
    for name, n, p, t in zip(("output", "hidden states", "routing weights", "biases"), new, plain, truth, strict=False):
        assert_accurate(n, p, t, name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LOW[:2], ids=str)
def test_a_block_of_4bit_experts(dtype: torch.dtype, compute: torch.dtype | None, bias: bool) -> None:
    check_block(nn.ModuleList(Expert(e, compute=compute, quant_type="nf4", bias=bias) for e in range(4)), dtype)


def test_T41_projections_compute_each_in_their_own_dtype() -> None:
    experts = nn.ModuleList(Expert(e, compute=torch.float32) for e in range(4))
    for expert in experts:
        expert.gate_proj.compute_dtype = torch.bfloat16
    check_block(experts, torch.float32)
    assert [expert_weights(experts, random(1, 32)).__dict__[n].compute_dtype for n in ("gate_proj", "up_proj")] == [
        torch.bfloat16,
        torch.float32,
    ]

"""What the ops read, write and keep: nothing outside their tensors, every byte of their results, and no more than promised.

A NaN that is read spreads to a result, so NaN is put wherever nothing may be read; results are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.testing import assert_accurate
from tests.gpu.on_gpu import KIND, QWEN3, TRIAL, UNEVEN, Device, Layer, Size, equal, needs_gpu, normal, tokens

pytestmark = needs_gpu

SIZES = pytest.mark.parametrize("size", [QWEN3, UNEVEN], ids=["qwen3", "uneven"])


def amid_nan(t: Tensor, guard: int = 1 << 12) -> Tensor:
    """The same values with NaN before and behind them, aligned as an allocation is."""
    wide = torch.full((t.numel() + 2 * guard,), float("nan"), dtype=t.dtype, device=t.device)
    return wide[guard : guard + t.numel()].view(t.shape).copy_(t)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Every tensor that is made without values holds NaN, or the largest integer."""
    fill, algorithms = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(algorithms)


@SIZES
@pytest.mark.parametrize("T", tokens(1, 19, 500))
def test_memory_around_the_tensors_is_not_read(size: Size, T: int) -> None:
    layer = Layer.draw(size, T, "dropped", torch.bfloat16)
    guarded = replace(layer, **{name: amid_nan(getattr(layer, name)) for name in ("x", "w", "gate_up", "down", "cotangent")})
    assert equal(layer.results(), guarded.results())


@SIZES
def test_dropped_tokens_are_not_read(size: Size) -> None:
    layer = Layer.draw(size, tokens(500)[0], "dropped", torch.bfloat16)
    dropped = ((layer.index < 0) | (layer.index >= size.E)).all(1)
    assert dropped.any() and not dropped.all()
    poisoned = replace(layer, x=layer.x.clone(), w=layer.w.clone())
    poisoned.x[dropped] = float("nan")
    poisoned.w[(layer.index < 0) | (layer.index >= size.E)] = float("nan")
    clean, found = layer.results(), poisoned.results()
    assert equal(clean, found)
    assert not found[0][dropped].any() and not found[1][dropped].any()


@SIZES
@pytest.mark.parametrize("routing", ["one", "empty", "dropped"])
def test_every_byte_of_a_result_is_written(size: Size, routing: str, device: Device) -> None:
    layer = Layer.draw(size, tokens(200)[0], routing, torch.bfloat16)
    clean = layer.results()
    device.fill_free_memory_with_nan()
    assert equal(clean, layer.results())
    with fresh_memory_is_nan():
        assert equal(clean, layer.results())


def saved_bytes(layer: Layer, frozen: bool, recompute: bool) -> int:
    """Of every storage that autograd keeps for the backward, each once, weights excluded."""
    leaves = [t.detach().requires_grad_(not frozen or k < 2) for k, t in enumerate((layer.x, layer.w, layer.gate_up, layer.down))]
    weights = {t.untyped_storage().data_ptr() for t in leaves[2:]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ops.grouped_forward(leaves[0], layer.index, *leaves[1:], recompute=recompute)
    assert out.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("kept", ["trainable", "frozen", "recompute"])
@pytest.mark.parametrize("T", tokens(64, 1024))
def test_saved_bytes_are_those_of_the_formula(T: int, kept: str) -> None:
    """bfloat16: x 2H unless frozen, pre-activation 4kI unless recomputed, and at most 16k for the routing, per token; E+1 offsets."""
    H, I, E, K = QWEN3.H, QWEN3.I, QWEN3.E, QWEN3.K  # noqa: E741
    fixed = T * ((0 if kept == "frozen" else 2 * H) + (0 if kept == "recompute" else 4 * K * I))
    saved = saved_bytes(Layer.draw(QWEN3, T, "uniform", torch.bfloat16), kept == "frozen", kept == "recompute")
    assert fixed < saved <= fixed + T * 16 * K + 4 * (E + 1)


def test_without_gradients_nothing_is_saved(device: Device) -> None:
    layer = Layer.draw(QWEN3, tokens(1024)[0], "uniform", torch.bfloat16)
    args = (layer.x, layer.index, layer.w, layer.gate_up, layer.down)
    with torch.no_grad():
        inference = device.peak_bytes(lambda: ops.grouped_forward(*args))
    training = device.peak_bytes(lambda: ops.grouped_forward(args[0].detach().requires_grad_(), *args[1:]))
    if inference is not None and training is not None:
        assert inference <= training


# int64 offsets: more than 2^31 elements of pre-activation, at few H and experts so that the rest stays small.
LONG = Size(32, 16, 4, 2) if TRIAL else Size(256, 768, 16, 8)


def test_offsets_beyond_32_bits() -> None:
    """About 10 GB. Only some tokens have a gradient, among them the last ones of the last expert; they alone decide all others."""
    T = 100 if TRIAL else 2**31 // (LONG.K * 2 * LONG.I) + 5000
    layer = Layer.draw(LONG, T, "uniform", torch.bfloat16)
    chosen = torch.cat([torch.arange(0, T, max(T // 997, 1)), torch.arange(T - 20, T)]).unique().to(KIND)
    only_chosen = torch.zeros_like(layer.cotangent)
    only_chosen[chosen] = layer.cotangent[chosen]
    new = replace(layer, cotangent=only_chosen).results()
    few = replace(layer, x=layer.x[chosen], index=layer.index[chosen], w=layer.w[chosen], cotangent=layer.cotangent[chosen])
    plain, truth = few.expected(torch.bfloat16), few.expected(torch.float64)
    for k, (p, t) in enumerate(zip(plain, truth, strict=True)):
        assert_accurate(new[k][chosen] if k < 3 else new[k], p, t, f"tensor {k}")
    rest = torch.ones(T, dtype=torch.bool, device=KIND)
    rest[chosen] = False
    assert not new[1][rest].any() and not new[2][rest].any()


def test_weights_and_their_gradients_beyond_32_bits() -> None:
    """E * 2I * H above 2^31, 7 GB and as much of gradients: the last expert lies behind the first 2^31 elements."""
    size = Size(64, 32, 8, 2) if TRIAL else Size(4096, 4096, 65, 2)
    E, last, T = size.E, size.E - 1, 40
    gate_up = torch.empty(E, 2 * size.I, size.H, dtype=torch.bfloat16, device=KIND)
    down = torch.empty(E, size.H, size.I, dtype=torch.bfloat16, device=KIND)
    for e in range(E):  # by expert: no float32 copy of the stack
        gate_up[e], down[e] = (normal(torch.bfloat16, 2 * e + k, 1, *stack.shape[1:])[0] for k, stack in enumerate((gate_up, down)))
    index = torch.stack((torch.arange(T) % last, torch.full((T,), last)), 1).to(KIND)
    x, cotangent = (normal(torch.bfloat16, seed, T, size.H) for seed in (1, 2))
    layer = Layer(size, x, index, torch.rand(T, size.K, device=KIND).bfloat16(), gate_up, down, cotangent)
    new = layer.results()
    frozen = replace(layer, frozen=True)
    for k, (p, t) in enumerate(zip(frozen.expected(torch.bfloat16), frozen.expected(torch.float64), strict=True)):
        if k != 2:  # the gradient of the routing weights has too few numbers to compare errors of
            assert_accurate(new[k], p, t, f"tensor {k}")
    alone = replace(
        layer, size=replace(size, E=1), index=torch.where(index == last, 0, -1), gate_up=gate_up[last:], down=down[last:]
    )  # the last expert's gradients need nothing of the others
    for k, (p, t) in enumerate(zip(alone.expected(torch.bfloat16)[3:], alone.expected(torch.float64)[3:], strict=True), start=3):
        assert_accurate(new[k][last:], p, t, f"tensor {k}")

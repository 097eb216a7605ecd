"""Shared by the tests of this folder: the device, the sizes, and expert layers of a real model's size with their float64 truth.

MOE_GPU_DEVICE=cpu runs the same tests on the CPU with small sizes, which tries the tests and says nothing about a GPU. Truth and
plain PyTorch are computed on the device, expert by expert, so that a float64 copy of a layer is the largest thing in memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.device import Device, device_named, tensors  # noqa: F401
from moe_ext import ops, reference
from moe_ext.experts import ExpertSpec, ExpertWeights
from moe_ext.testing import assert_accurate
from tests.helpers.error_rule import ENOUGH_NUMBERS

ROOT = Path(__file__).resolve().parents[2]
KIND = os.environ.get("MOE_GPU_DEVICE", "cuda")
TRIAL = KIND == "cpu"
needs_gpu = pytest.mark.skipif(
    not TRIAL and not (torch.cuda.is_available() and ops.CUDA_LIBRARY.exists()), reason="needs a CUDA device and a build with CUDA"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the CPU has nothing in its place")


@dataclass(frozen=True)
class Size:
    H: int
    I: int  # noqa: E741
    E: int
    K: int


#: Qwen3-30B-A3B's experts; and one whose sizes are no multiple of a tile.
QWEN3 = Size(64, 32, 16, 4) if TRIAL else Size(2048, 768, 128, 8)
UNEVEN = Size(40, 24, 10, 3) if TRIAL else Size(1032, 712, 20, 3)


def tokens(*counts: int) -> list[int]:
    return sorted({min(count, 24) for count in counts} if TRIAL else set(counts))


ROUTINGS = ("uniform", "zipf", "one", "empty", "dropped")


def route(size: Size, T: int, kind: str, seed: int = 0) -> Tensor:
    """`[T, K]`. zipf: expert e with weight 1/(e+1); one: all to the same; empty: a tenth of the experts gets nothing; dropped: a
    third of the slots has an id outside [0, E), and every fifth token no expert at all."""
    generator = torch.Generator().manual_seed(seed + 1000 * T)
    likelihood = torch.ones(size.E)
    if kind == "zipf":
        likelihood = 1 / torch.arange(1, size.E + 1)
    if kind == "empty":
        likelihood[torch.randperm(size.E, generator=generator)[: -(-size.E // 10)]] = 0
    if kind == "one":
        index = torch.full((T, size.K), size.E // 2)
    else:
        index = torch.multinomial(likelihood.expand(T, size.E), size.K, generator=generator)
    if kind == "dropped":
        index[torch.rand(T, size.K, generator=generator) < 1 / 3] = size.E + 1
        index[::5] = -1
    return index.to(KIND)


@dataclass
class Layer:
    """Arguments of grouped_forward, and a gradient of its result. frozen: no gradient of the weights."""

    size: Size
    x: Tensor
    index: Tensor
    w: Tensor
    gate_up: Tensor
    down: Tensor
    cotangent: Tensor
    frozen: bool = False
    recompute: bool = False

    @classmethod
    def draw(cls, size: Size, T: int, kind: str, dtype: torch.dtype, seed: int = 0) -> Layer:
        gate_up = normal(dtype, seed, size.E, 2 * size.I, size.H)
        down = normal(dtype, seed + 1, size.E, size.H, size.I)
        return cls(size, *rows(size, T, kind, dtype, seed), gate_up, down, normal(dtype, seed + 2, T, size.H))

    def again(self, kind: str, seed: int) -> Layer:
        """Other rows and another routing, the same weights, frozen."""
        T = len(self.x)
        x, index, w = rows(self.size, T, kind, self.x.dtype, seed)
        return Layer(self.size, x, index, w, self.gate_up, self.down, normal(self.x.dtype, seed + 2, T, self.size.H), True, self.recompute)

    def results(self) -> list[Tensor]:
        """Result, and the gradients of x, w and, unless frozen, gate_up and down."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.w, *(() if self.frozen else (self.gate_up, self.down)))]
        weights = leaves[2:] or (self.gate_up, self.down)
        out = ops.grouped_forward(leaves[0], self.index, leaves[1], *weights, recompute=self.recompute)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)]

    def expected(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by the formula, in `dtype`. Weights are leaves by expert: the gradient of a slice of a stack would be a stack."""
        x, w = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.w))
        parts: list[list[Tensor]] = []
        weights = ExpertWeights(gate_up_proj=self.gate_up, down_proj=self.down)
        if not self.frozen:
            parts = [[m.to(dtype).requires_grad_() for m in stack] for stack in (*self.gate_up.chunk(2, 1), self.down)]
            weights = ExpertWeights(gate_proj=parts[0], up_proj=parts[1], down_proj=parts[2])
        out = reference.grouped_experts(x, self.index, w, weights, ExpertSpec())
        inputs = [x, w, *(leaf for part in parts for leaf in part)]
        if out.requires_grad:
            found = list(torch.autograd.grad(out, inputs, self.cotangent.to(dtype), allow_unused=True, materialize_grads=True))
        else:  # no slot reaches an expert
            found = [torch.zeros_like(t) for t in inputs]
        results = [out.detach(), *found[:2]]
        if parts:
            gate, up, down = (torch.stack(found[2 + k * self.size.E : 2 + (k + 1) * self.size.E]) for k in range(3))
            results += [torch.cat((gate, up), 1), down]
        return results


def normal(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random normal; a stack of matrices is divided by the square root of its rows' length."""
    values = torch.randn(shape, generator=torch.Generator(KIND).manual_seed(seed), device=KIND)
    return values.div_(shape[-1] ** 0.5 if len(shape) == 3 else 1).to(dtype)


def rows(size: Size, T: int, kind: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, top_k_index, top_k_weights."""
    w = torch.rand(T, size.K, generator=torch.Generator(KIND).manual_seed(seed), device=KIND).to(dtype)
    return normal(dtype, seed + 3, T, size.H), route(size, T, kind, seed), w


NAMES = ("out", "x.grad", "w.grad", "gate_up.grad", "down.grad")


def check(layer: Layer, kind: str) -> None:
    """By the error rule, one tensor after the other; those of few tokens over several draws, as chance decides the error of few numbers."""
    draws = [layer, *(layer.again(kind, 10 * seed) for seed in range(1, -(-ENOUGH_NUMBERS // max(layer.w.numel(), 1))))]
    new, plain, truth = (
        by_tensor([get(draw) for draw in draws])
        for get in (Layer.results, lambda d: d.expected(d.x.dtype), lambda d: d.expected(torch.float64))
    )
    for name, n, p, t in zip(NAMES, new, plain, truth, strict=True):
        assert_accurate(*(torch.cat([part.flatten() for part in parts]) for parts in (n, p, t)), name)


def by_tensor(results: list[list[Tensor]]) -> list[list[Tensor]]:
    """The k-th tensor of each draw that has one: only the first has gradients of weights."""
    return [[draw[k] for draw in results if k < len(draw)] for k in range(len(results[0]))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

"""bitsandbytes 4-bit linear layers on the CPU: small random ones, whole models of them, what they compute themselves, and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_ext.integrations.run import bitsandbytes as ours
from moe_ext.testing import assert_accurate

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")
Linear4bit = bitsandbytes.nn.Linear4bit

COUNTS = [9, 0, 20, 1, 14]
LOW = (torch.float32, torch.bfloat16, torch.float16)


def linear4bit(
    out_features: int = 48,
    in_features: int = 64,
    compute: torch.dtype | None = None,
    stored: torch.dtype = torch.float32,
    blocksize: int = 64,
    seed: int = 0,
    bias: bool = False,
    **options: Any,
) -> Any:
    """A quantized layer. stored: the dtype that its weight had; options: quant_type, compress_statistics, quant_storage."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    linear = Linear4bit(in_features, out_features, bias=bias, compute_dtype=compute, **options)
    if bias:
        linear.bias.data = torch.randn(out_features, generator=generator).to(stored)
    return quantize(linear, weight.to(stored), blocksize)


def quantize(linear: Any, weight: Tensor, blocksize: int = 64) -> Any:
    """Gives `linear` a new weight, as loading it and moving it to a device would."""
    old = linear.weight
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, blocksize=blocksize, compress_statistics=old.compress_statistics,
        quant_type=old.quant_type, quant_storage=old.quant_storage, module=linear,
    )  # fmt: skip
    linear.to("cpu")
    linear.support_avx512bf16_for_cpu = False  # else its forward in evaluation rewrites the weight, on some processors
    return linear


def experts4bit(count: int = 5, out_features: int = 48, in_features: int = 64, **options: Any) -> nn.ModuleList:
    return nn.ModuleList(linear4bit(out_features, in_features, seed=e, **options) for e in range(count))


def dense(linear: Any, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """The weight as bitsandbytes itself dequantizes it, to `dtype`; None is the dtype that was quantized."""
    state = copy.copy(linear.weight.quant_state)
    state.dtype = dtype or state.dtype
    return bitsandbytes.functional.dequantize_4bit(linear.weight, state)


def quantize_linears(root: nn.Module, compute: torch.dtype | None = None, **options: Any) -> nn.Module:
    """Replaces the linear layers below `root`, in place, but for routers and the language model's head; returns `root`."""
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear and name not in ("gate", "lm_head"):
                new = Linear4bit(child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=compute, **options)
                if child.bias is not None:
                    new.bias = child.bias
                setattr(module, name, quantize(new, child.weight.detach()))
    return root


def exact_copy(root: nn.Module) -> nn.Module:
    """`root` in float64, with the numbers that its 4-bit layers have."""
    exact = copy.deepcopy(root)
    for module in list(exact.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Linear4bit):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight = nn.Parameter(dense(child), requires_grad=False)
                if child.bias is not None:
                    linear.bias = nn.Parameter(child.bias.detach().clone())
                setattr(module, name, linear)
    return exact.double()


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def loop(linears: Sequence[nn.Module], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """What the modules themselves make of sorted rows."""
    return torch.cat([linear(part) for linear, part in zip(linears, rows.split(list(counts)), strict=True) if part.shape[0]])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(linears: Any, like: Tensor | None = None, cache: ours.DenseCache | None = None) -> ours.Quantized4bit:
    return ours.read(linears, like, cache)


def product_and_gradient(compute: Callable[[Tensor], Tensor], rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_()
    out = compute(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def check(linears: Any, dtype: torch.dtype = torch.float32, cache: ours.DenseCache | None = None) -> None:
    """`[S, out]` and the gradient `[S, in]`. bitsandbytes rounds the weights of the backward to the dtype that was quantized."""
    rows, grad = random(sum(COUNTS), linears[0].in_features, dtype=dtype), random(sum(COUNTS), linears[0].out_features, dtype=dtype, seed=1)
    plain = product_and_gradient(lambda x: loop(linears, x, COUNTS), rows, grad)
    new = product_and_gradient(lambda x: read(linears, x, cache).grouped_mm(x, offsets_of(COUNTS)), rows, grad)
    forward, backward = ([dense(m, d).double() for m in linears] for d in (torch.float32, None))
    parts = list(enumerate(zip(rows.double().split(COUNTS), grad.double().split(COUNTS), strict=True)))
    truth = torch.cat([x @ forward[e].T for e, (x, _) in parts]), torch.cat([g @ backward[e] for e, (_, g) in parts])
    for name, n, p, t in zip(("product", "gradient"), new, plain, truth, strict=True):
        assert n.dtype == dtype
        assert_accurate(n, p, t, name)


def pack_for_cpu(linear: Any) -> Any:
    """What the module's forward does in evaluation on a processor with AVX512-BF16; it can be done on any."""
    linear.weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
    return linear

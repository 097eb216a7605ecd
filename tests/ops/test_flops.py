"""T107 FlopCounterMode counts nothing for an op without a formula: here it counts what it counts for plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.op_table import Case, tensors


def count(function: Any, args: Any, options: dict[str, Any], trained: tuple[int, ...]) -> int:
    args = [_leaf(a) if i in trained else a for i, a in enumerate(args)]
    leaves = [t for t in tensors(args) if t.requires_grad]
    with FlopCounterMode(display=False) as mode:
        out = function(*args, **options)
        if leaves:
            torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    return int(mode.get_total_flops())


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return None if value is None else [v.detach().requires_grad_() for v in value]


LAYERS = ["default", "gpt_oss", "gelu_tanh", "relu"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", [(), (0,), (0, 2, 3, 4), (3,), (4,), (2,)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_T107_flops_of_a_layer(name: str, trained: tuple[int, ...], recompute: bool) -> None:
    case = Case("grouped_forward", name)
    args, options = case.inputs(torch.float32)
    S, inner = args[1].numel(), args[4].shape[1 if options.get("transposed") else 2]  # noqa: N806
    hidden, width = args[0].shape[1], args[3].shape[2 if options.get("transposed") else 1]
    expected = count(case.entry.reference, args, options, trained)
    if trained == (2,):  # the gradient of a routing weight is <da, a>, where plain PyTorch has kept the expert's output
        expected += 2 * S * hidden * inner
    if recompute and trained:
        expected += 2 * S * hidden * width
    assert count(case.function, args, options | {"recompute": recompute}, trained) == expected > 0


@pytest.mark.parametrize("trained", [(), (0,), (0, 2, 3, 4, 5), (5,)], ids=str)
def test_T107_flops_of_a_list(trained: tuple[int, ...]) -> None:
    case = Case("grouped_forward.list", "default")
    args, options = case.inputs(torch.float32)
    assert count(case.function, args, options, trained) == count(case.entry.reference, args, options, trained) > 0


@pytest.mark.parametrize("op", ["grouped_mm", "grouped_mm.list", "grouped_mm_wgrad"])
@pytest.mark.parametrize("trained", [(), (0,), (0, 1)], ids=str)
def test_T107_flops_of_the_products(op: str, trained: tuple[int, ...]) -> None:
    """Of a product all rows count, whether an expert has them or not."""
    case = Case(op, "default")
    args, options = case.inputs(torch.float32)
    weight = args[1][0] if isinstance(args[1], list) else args[1]
    one = 2 * args[0].shape[0] * args[0].shape[1] * (weight.shape[-1] if op == "grouped_mm_wgrad" else weight.shape[-2])
    assert count(case.function, args, options, trained) == one * (1 + len(trained))

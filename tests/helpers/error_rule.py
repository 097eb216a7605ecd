"""One case of the op table on one device: results and gradients against the float64 truth, by the error rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ext.testing import assert_accurate
from tests.helpers.op_table import Case, results_and_gradients, to_double

# The rule compares two random errors, of which a few large numbers may make most (relu2): each is measured on at least so many
# numbers, the same tensor of several draws, and all experts' tensors of a list, which are one tensor in the stacked overload.
ENOUGH_NUMBERS = 500


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(to_device(v, device) for v in value) if isinstance(value, (tuple, list)) else value


def _new_plain_truth(case: Case, dtype: torch.dtype, draw: int, device: str) -> list[list[Tensor]]:
    args, kwargs = case.inputs(dtype, draw=draw)
    reference = case.entry.reference
    functions = ((case.function, to_device(args, device)), (reference, args), (reference, to_double(args)))
    results = [results_and_gradients(case, function, values, kwargs, seed=f"grad/{draw}") for function, values in functions]
    return [[t.cpu() for t in result] for result in results]


def check_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    """New is the op on `device`; plain PyTorch and the truth are computed on the CPU."""
    draws = [_new_plain_truth(case, dtype, 0, device)]
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(draws[0][0]):
        groups.setdefault(t.shape if case.op.endswith(".list") and t.is_floating_point() else i, []).append(i)
    sizes = [sum(draws[0][0][i].numel() for i in group) for group in groups.values() if draws[0][0][group[0]].is_floating_point()]
    smallest = min((n for n in sizes if n), default=ENOUGH_NUMBERS)
    draws += [_new_plain_truth(case, dtype, draw, device) for draw in range(1, -(-ENOUGH_NUMBERS // smallest))]
    for group in groups.values():
        new, plain, truth = (torch.cat([draw[which][i].flatten() for draw in draws for i in group]) for which in range(3))
        if new.is_floating_point():
            assert_accurate(new, plain, truth, f"tensor {group[0]}")
        else:
            assert torch.equal(new, plain)

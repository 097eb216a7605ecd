"""T131: offsets and maps that point outside raise on the CPU, with the values in the message and before anything is computed.
On CUDA, where the host cannot look at them, kernels keep inside the tensors: tests/gpusim/test_gpusim_bad_indices.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext import ops
from tests.helpers.op_table import Case

T, K, E, H = 7, 2, 5, 16
S = T * K
FAR = 2**30


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def changed(values: Tensor, at: int, value: int) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


OFFSETS = int32(0, 3, 5, 9, 12, 14)
IDENTITY = torch.arange(S, dtype=torch.int32)
ROWS, TOKENS = torch.randn(S, H), torch.randn(T, H)
STACK, WEIGHTS = torch.randn(E, H, H), torch.rand(T, K)

WITH_OFFSETS: dict[str, Callable[[Tensor], Any]] = {
    "grouped_mm": lambda o: ops.grouped_mm(ROWS, STACK, o),
    "grouped_mm_list": lambda o: ops.grouped_mm(ROWS, list(STACK), o, list(STACK[0, :E])),
    "grouped_mm_wgrad": lambda o: ops.grouped_mm_wgrad(ROWS, ROWS, o),
    "grouped_mm_wgrad_list": lambda o: ops.moe_ext.grouped_mm_wgrad.list(ROWS, ROWS, o),
    "grouped_bias_grad": lambda o: ops.moe_ext.grouped_bias_grad(ROWS, o),
}
BAD_OFFSETS = {
    "past_the_rows": (changed(OFFSETS, 5, 1_000_000), r"expert_offsets\[5\] is 1000000 but there are S=14 rows"),
    "one_past_the_rows": (changed(OFFSETS, 5, 15), r"expert_offsets\[5\] is 15 but there are S=14 rows"),
    "negative": (changed(OFFSETS, 0, -100_000_000), r"expert_offsets\[0\] is -100000000, expected 0"),
    "begins_late": (changed(OFFSETS, 0, 1), r"expert_offsets\[0\] is 1, expected 0"),
    "falls": (changed(OFFSETS, 3, 4), r"expert_offsets\[3\] is 4 after 5: offsets must not fall"),
    "in_the_middle": (changed(OFFSETS, 2, FAR), r"expert_offsets\[3\] is 9 after 1073741824"),
}


@pytest.mark.parametrize("bad", BAD_OFFSETS)
@pytest.mark.parametrize("op", WITH_OFFSETS)
def test_T131_offsets_outside_raise(op: str, bad: str) -> None:
    WITH_OFFSETS[op](OFFSETS)
    offsets, message = BAD_OFFSETS[bad]
    with pytest.raises(RuntimeError, match=f"{op.removesuffix('_list')}: {message}"):
        WITH_OFFSETS[op](offsets)


WITH_MAPS: dict[str, Callable[[Tensor], Any]] = {
    "row_to_slot of permute": lambda m: ops.permute(TOKENS, m, IDENTITY, K),
    "slot_to_row of permute": lambda m: ops.permute(TOKENS, IDENTITY, m, K),
    "row_to_slot of unpermute": lambda m: ops.unpermute(ROWS, m, IDENTITY, K),
    "slot_to_row of unpermute": lambda m: ops.unpermute(ROWS, IDENTITY, m, K, WEIGHTS),
    "row_to_slot of unpermute_backward": lambda m: ops.moe_ext.unpermute_backward(TOKENS, ROWS, m, WEIGHTS),
}


@pytest.mark.parametrize("value", [S, FAR, -2, -(2**31)])
@pytest.mark.parametrize("op", WITH_MAPS)
def test_T131_maps_outside_raise(op: str, value: int) -> None:
    WITH_MAPS[op](IDENTITY)
    WITH_MAPS[op](changed(IDENTITY, 3, -1))
    name, _, function = op.split()
    with pytest.raises(RuntimeError, match=rf"{function}: {name}\[3\] is {value}, expected -1 to 13"):
        WITH_MAPS[op](changed(IDENTITY, 3, value))


@pytest.mark.parametrize("listed", ["", ".list"])
@pytest.mark.parametrize(("argument", "at", "value"), [(4, -1, FAR), (4, 1, -1), (5, 0, FAR), (5, 0, -1), (6, 0, FAR)])
def test_T131_the_backward_checks_what_was_saved(listed: str, argument: int, at: int, value: int) -> None:
    args, options = Case(f"_grouped_backward{listed}", "all").inputs(torch.float32)
    function = Case(f"_grouped_backward{listed}", "all").function
    function(*args, **options)
    bad = [*args]
    bad[argument] = changed(args[argument], at, value)
    with pytest.raises(RuntimeError, match=r"grouped_backward: (expert_offsets|row_to_slot|slot_to_row)\["):
        function(*bad, **options)


def test_T131_maps_of_another_device_raise() -> None:
    with pytest.raises(RuntimeError, match="different devices|another device"):
        ops.unpermute(ROWS, IDENTITY, IDENTITY, K, WEIGHTS.to("meta"))


def test_T131_gated_rows_have_two_halves() -> None:
    with pytest.raises(RuntimeError, match="gated_activation_backward: pre_act has 5 columns"):
        ops.moe_ext.gated_activation_backward(torch.zeros(3, 2), torch.zeros(3, 5))

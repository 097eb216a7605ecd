"""The op table on a CUDA device: every op obeys the error rule, repeats bit for bit, and waits for nothing on the host."""

from __future__ import annotations

import pytest
import torch
from error_rule import check_error_rule, to_device
from op_table import CASES, Case

from moe_ext import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.CUDA_LIBRARY.exists()), reason="needs a CUDA device and a build with CUDA"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    check_error_rule(case, dtype, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_repeat_bit_for_bit_without_a_host_synchronisation(case: Case) -> None:
    args, kwargs = case.inputs(torch.bfloat16)
    args = to_device(args, "cuda")
    case.function(*args, **kwargs)  # loads the kernel
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [case.function(*args, **kwargs) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for run in runs[1:]:
        for a, b in zip(*((r if isinstance(r, (tuple, list)) else (r,)) for r in (runs[0], run)), strict=True):
            assert torch.equal(a, b)

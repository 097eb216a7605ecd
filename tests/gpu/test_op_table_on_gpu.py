"""The op table on a CUDA device: the ops that have a CUDA kernel obey the error rule, the others say that they have none."""

from __future__ import annotations

import pytest
import torch
from error_rule import check_error_rule, to_device
from op_table import CASES, Case

from moe_ext import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.CUDA_LIBRARY.exists()), reason="needs a CUDA device and a build with CUDA"
)

WITH_KERNEL = ("permute", "unpermute", "unpermute_backward", "gated_activation", "gated_activation_backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.op in WITH_KERNEL], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    check_error_rule(case, dtype, "cuda")


@pytest.mark.parametrize("case", [c for c in CASES if c.op in WITH_KERNEL], ids=str)
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


@pytest.mark.parametrize("op", sorted({c.op for c in CASES} - set(WITH_KERNEL)))
def test_an_op_without_a_kernel_says_so(op: str) -> None:
    case = next(c for c in CASES if c.op == op)
    args, kwargs = case.inputs(torch.float32)
    with pytest.raises(RuntimeError, match="this build has no CUDA kernel for it"):
        case.function(*to_device(args, "cuda"), **kwargs)

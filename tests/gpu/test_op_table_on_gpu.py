"""The op table on a CUDA device: every op obeys the error rule, repeats bit for bit, and waits for nothing on the host."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.on_gpu import KIND, Device, equal, needs_gpu, tensors
from tests.helpers.error_rule import check_error_rule, to_device
from tests.helpers.op_table import CASES, Case

pytestmark = needs_gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    check_error_rule(case, dtype, KIND)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_repeat_bit_for_bit_without_a_host_synchronisation(case: Case, device: Device) -> None:
    args, kwargs = case.inputs(torch.bfloat16)
    args = to_device(args, KIND)
    case.function(*args, **kwargs)  # loads the kernel
    with device.no_host_synchronisation():
        runs = [tensors(case.function(*args, **kwargs)) for _ in range(5)]
    assert all(equal(runs[0], run) for run in runs[1:])

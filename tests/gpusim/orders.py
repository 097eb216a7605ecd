"""A kernel of 9.0 in other orders of events, and broken on purpose: what the test files of single kernels share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_ext.testing import SimulationError, simulated_gpu
from tests.gpusim.harness import folder
from tests.gpusim.mutations import Mutation, mutated

Run = Callable[[], Sequence[Tensor]]  # makes the inputs and runs the kernel

# Asynchronous work early, late and in between, warps in other orders.
MODES = ({"ASYNC": "early"}, {"ASYNC": "1", "SCHED": "1"}, {"ASYNC": "late", "SCHED": "2"})
STRICT = {"ASYNC": "late", "STRICT": "1"}  # cp.async is a write that needs a fence


def digest(run: Run, **mode: str) -> str:
    """Of the results' bits."""
    with simulated_gpu(folder(), 90, **mode):
        return hashlib.sha256(b"".join(t.contiguous().view(torch.int16).numpy().tobytes() for t in run())).hexdigest()


def assert_same_bits_in_any_order(run: Run) -> None:
    modes = ({}, *MODES, STRICT)
    assert [digest(run, **mode) for mode in modes] == [digest(run)] * len(modes)


def noticed(m: Mutation, run: Run) -> str:
    """How, or ''."""
    expected = digest(run)
    for mode in ({"ASYNC": "late"}, *MODES):
        name = ", ".join(f"{k}={v}" for k, v in mode.items())
        try:
            with mutated(m.setting, 90, **mode):
                if digest(run, **mode) != expected:
                    return f"{name}: wrong result"
        except (SimulationError, AssertionError, RuntimeError) as error:
            return f"{name}: {str(error).splitlines()[0][:120]}"
    return ""

"""What the kernels move, against docs/gpu-counters.json: one that starts to move more bytes is seen where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_ext.testing import SimulatedGpu
from tests.gpusim.harness import Instructions, needs_nvcc
from tests.gpusim.mutations import kernels_of_9_0

pytestmark = needs_nvcc


def test_known_counts(tmp_path: Path) -> None:
    gpu = Instructions(tmp_path / "instructions.so", "80")
    SimulatedGpu(gpu.simulator).take_launches()
    out = torch.zeros(32, dtype=torch.int16)
    assert gpu.run("counted", torch.arange(32, dtype=torch.int32), out) == ""
    assert out.tolist() == [t // 2 * 2 for t in range(32)]
    (found,) = SimulatedGpu(gpu.simulator).take_launches()
    assert (found["global_loaded"], found["unique_loaded"]) == (256, 128)
    assert (found["global_stored"], found["unique_stored"]) == (64, 64)
    assert (found["shared_accesses"], found["bank_conflicts"]) == (2, 3 + 1)  # 16 different words lie in 8 banks
    assert (found["barrier_waits"], found["tensor_macs"]) == (1, 0)
    assert gpu.run("mma", torch.zeros(24, 16, dtype=torch.bfloat16), torch.zeros(16, 8)) == ""
    assert SimulatedGpu(gpu.simulator).take_launches()[0]["tensor_macs"] == 16 * 8 * 16


@pytest.mark.parametrize("architecture", [80, 90])
def test_counters_are_as_recorded(architecture: int) -> None:
    from tools import gpu_counters

    if architecture == 90 and not kernels_of_9_0():
        pytest.skip("CUTLASS is not installed, so the library has no kernels of sm_90a")
    recorded = json.loads(gpu_counters.FILE.read_text())
    found = gpu_counters.measure_all((architecture,))
    assert not (lines := gpu_counters.differences(found, recorded)), "\n".join(lines)
    assert {key for key in recorded["counters"] if f"sm_{architecture}" in key} == set(found)


def test_table_is_that_of_the_counters() -> None:
    from tools import gpu_counters

    counters = json.loads(gpu_counters.FILE.read_text())["counters"]
    assert gpu_counters.FILE.with_suffix(".md").read_text() == gpu_counters.table(counters)

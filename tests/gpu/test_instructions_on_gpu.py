"""The simulator's small kernels on a GPU: the results that the simulator recorded, bit for bit.

Their inputs to tensor cores are whole numbers, whose sums are exact in any order. PTX of sm_80 is compiled by the driver, as it is
where no machine code fits; sm_90a by nvcc.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools import toolchain
from tests.gpu.on_gpu import ROOT, TRIAL, needs_gpu
from tests.gpusim.record import FILE, HERE, source_digest, unpack
from tools.gpusim_build import PTX_FLAGS

NVCC = toolchain.find_nvcc(os.environ)
pytestmark = [needs_gpu, pytest.mark.skipif(NVCC is None, reason="nvcc is needed to compile the kernels, and was not found")]

RECORDED = json.loads(FILE.read_text())
TARGETS = {"80": "arch=compute_80,code=compute_80", "90a": "arch=compute_90a,code=sm_90a"}


LIBRARIES = sorted({(call["source"], call["architecture"]) for call in RECORDED["calls"]})


def compile_for_gpu(source: str, architecture: str, output: Path) -> Path:
    command = [str(NVCC), *PTX_FLAGS, "-shared", "-gencode", TARGETS[architecture], str(HERE / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


class OnGpu:
    """As gpusim.harness.Instructions, with the CUDA runtime in place of the simulator."""

    def __init__(self, source: str, architecture: str, output: Path) -> None:
        self.library = ctypes.CDLL(str(compile_for_gpu(source, architecture, output)))

    def call(self, args: list[Any]) -> list[Tensor]:
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        torch.cuda.synchronize()
        status = self.library.run(*map(as_c, moved))
        torch.cuda.synchronize()
        assert status == 0, f"CUDA error {status}"
        return [a.cpu() for a in moved if isinstance(a, Tensor)]


class Simulated:
    """For a trial without a GPU."""

    def __init__(self, source: str, architecture: str, output: Path) -> None:
        from tests.gpusim.harness import Instructions

        self.instructions = Instructions(output, architecture, source)

    def call(self, args: list[Any]) -> list[Tensor]:
        assert self.instructions.run(*args) == ""
        return [a for a in args if isinstance(a, Tensor)]


def as_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return value.encode() if isinstance(value, str) else value


@pytest.fixture(scope="module", params=LIBRARIES, ids="-".join)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], OnGpu | Simulated]:
    """The recorded calls of one library, and the library."""
    source, architecture = request.param
    if not TRIAL and architecture == "90a" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("code for sm_90a runs on compute capability 9.0 only")
    output = tmp_path_factory.mktemp("instructions") / f"on_gpu_{architecture}.so"
    calls = [call for call in RECORDED["calls"] if (call["source"], call["architecture"]) == request.param]
    return calls, (Simulated if TRIAL else OnGpu)(source, architecture, output)


def test_the_recording_is_of_todays_kernels() -> None:
    assert RECORDED["source"] == source_digest(), "a file of kernels has changed: run python -m tests.gpusim.record"


def test_the_simulator_was_right(kernels: tuple[list[dict[str, Any]], OnGpu | Simulated]) -> None:
    calls, runner = kernels
    wrong = []
    for call in calls:
        found = runner.call([unpack(value) for value in call["before"]])
        for number, (f, e) in enumerate(zip(found, map(unpack, call["after"]), strict=True)):
            different = (f.view(torch.uint8) != e.view(torch.uint8)).sum().item()
            if different:
                wrong.append(f"{call['before'][0]}: tensor {number}, {different} bytes")
    assert not wrong, f"{len(wrong)} of {len(calls)} calls differ: " + "; ".join(wrong)

"""Builds the simulator for tests, once per process, and runs small kernels on numpy-like tensors through it.

Without nvcc there is no PTX to simulate: those tests are skipped with that reason. Any other failure to build is a failed test.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # build_tools is not part of the package

from build_tools import gpusim, toolchain  # noqa: E402

needs_nvcc = pytest.mark.skipif(
    toolchain.find_nvcc(os.environ) is None or torch.version.cuda is not None,
    reason="the simulator executes the PTX that nvcc makes, beside a CPU build of torch; nvcc is missing or torch has CUDA",
)


@functools.cache
def folder() -> Path:
    """Where libgpusim.so and libmoe_cuda_sim.so are."""
    return gpusim.build().simulator.parent


class Instructions:
    """The kernels of instructions.cu, for one target."""

    def __init__(self, output: Path, architecture: str) -> None:
        self.library = ctypes.CDLL(str(gpusim.compile_test(Path(__file__).parent / "instructions.cu", output, architecture)))
        self.simulator = ctypes.CDLL(str(gpusim.build(kernels=False).simulator))
        self.simulator.gpusim_take_error.restype = ctypes.c_char_p
        self.architecture = int(architecture[:2])

    def register(self, t: Tensor) -> ctypes.c_void_p:
        self.simulator.gpusim_set_architecture(self.architecture)
        self.simulator.gpusim_register(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.numel() * t.element_size()))
        return ctypes.c_void_p(t.data_ptr())

    def run(self, name: str, given: Tensor, result: Tensor, n: int = 0) -> str:
        """What the simulator complains about, or ''."""
        pointers = [self.register(t) for t in (given, result)]
        status = self.library.run(name.encode(), *pointers, n)
        self._forget(given, result)
        message = str(self.simulator.gpusim_take_error().decode())
        assert (status == 0) == (message == ""), (status, message)
        return message

    def run_tma(self, given: Tensor, result: Tensor, image: Tensor) -> str:
        self.library.run_tma(*(self.register(t) for t in (given, result, image)))
        self._forget(given, result, image)
        return str(self.simulator.gpusim_take_error().decode())

    def _forget(self, *tensors: Tensor) -> None:
        for t in tensors:
            self.simulator.gpusim_unregister(ctypes.c_void_p(t.data_ptr()))

"""Builds the simulator for tests, once per process, and runs small kernels on numpy-like tensors through it.

Without nvcc there is no PTX to simulate: those tests are skipped with that reason. Any other failure to build is a failed test.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from build_tools import toolchain
from tools import gpusim_build

ROOT = Path(__file__).resolve().parents[2]

needs_nvcc = pytest.mark.skipif(
    toolchain.find_nvcc(os.environ) is None or torch.version.cuda is not None,
    reason="the simulator executes the PTX that nvcc makes, beside a CPU build of torch; nvcc is missing or torch has CUDA",
)


@functools.cache
def folder() -> Path:
    """Where libgpusim.so and libmoe_cuda_sim.so are."""
    return gpusim_build.build().simulator.parent


class Loaded:
    """A library of kernels over the simulator; its function `run` launches them."""

    def __init__(self, library: Path, architecture: int) -> None:
        self.library = ctypes.CDLL(str(library))
        self.simulator = ctypes.CDLL(str(gpusim_build.build(kernels=False).simulator))
        self.simulator.gpusim_take_error.restype = ctypes.c_char_p
        self.architecture = architecture

    def call(self, *arguments: Any) -> str:
        """Tensors become device memory for the call. What the simulator complains about, or ''."""
        self.simulator.gpusim_set_architecture(self.architecture)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        for t in tensors:
            self.simulator.gpusim_register(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.numel() * t.element_size()))
        status = self.library.run(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))
        for t in tensors:
            self.simulator.gpusim_unregister(ctypes.c_void_p(t.data_ptr()))
        message = str(self.simulator.gpusim_take_error().decode())
        assert (status == 0) == (message == ""), (status, message)
        return message


class Instructions(Loaded):
    """The kernels of instructions.cu, or of another file like it, for one target."""

    def __init__(self, output: Path, architecture: str, source: str = "instructions.cu") -> None:
        super().__init__(gpusim_build.compile_test(Path(__file__).parent / source, output, architecture), int(architecture[:2]))
        self.source = source

    def run(self, name: str, given: Tensor, result: Tensor, n: int = 0, change: str = "") -> str:
        """change: a mutation (ptx/mutation.h) of kernels whose names contain `name`."""
        with changed(self.simulator, f"{name};{change}" if change else ""):
            return self.call(name.encode(), given, result, n)


@contextmanager
def changed(simulator: ctypes.CDLL, mutation: str) -> Iterator[None]:
    """Kernels are decoded anew, so that the statement is changed, and once more afterwards."""
    if not mutation:
        yield
        return
    simulator.gpusim_forget_kernels()
    os.environ["GPUSIM_MUTATE"] = mutation
    try:
        yield
    finally:
        del os.environ["GPUSIM_MUTATE"]
        simulator.gpusim_forget_kernels()

"""The error rule, for our tests and for yours, and a GPU to run the CUDA kernels on where there is none.

A result is accepted when its error against the float64 truth is at most twice the error that plain PyTorch makes in the same
dtype. No tolerance appears anywhere: the yardstick is measured on the same inputs. Where plain PyTorch happens to be exact
(an identity, a copy, one term in a sum), the yardstick is the rounding of the truth itself to that dtype.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: New error / plain error that is still accepted. The one number of the rule.
ERROR_RATIO = 2.0


@dataclass(frozen=True)
class ErrorReport:
    """Errors are relative, in the Euclidean norm: `|x - truth| / |truth|` (absolute where the truth is zero)."""

    new: float
    plain: float

    @property
    def ok(self) -> bool:
        return self.new <= ERROR_RATIO * self.plain

    @property
    def ratio(self) -> float:
        return self.new / self.plain if self.plain else (0.0 if self.new == 0 else float("inf"))

    def __str__(self) -> str:
        return f"error {self.new:.3e} against plain PyTorch's {self.plain:.3e} (ratio {self.ratio:.2f}, allowed {ERROR_RATIO:g})"


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """`|x - truth| / |truth|`, computed in float64; NaN or infinity in `x` where the truth is finite gives infinity."""
    x, truth = x.detach().double(), truth.detach().double()
    if x.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(truth.shape)}")
    if x.numel() == 0:
        return 0.0
    scale = truth.norm().item()
    error = (x - truth).norm().item() / (scale or 1.0)
    return error if error == error else float("inf")


def compare(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> ErrorReport:
    """Measures `new` and `plain` (same dtype) against `truth` (float64)."""
    if new.dtype != plain.dtype:
        raise ValueError(f"dtypes differ: new {new.dtype}, plain {plain.dtype}")
    rounding = relative_error(truth.to(new.dtype), truth)
    return ErrorReport(relative_error(new, truth), max(relative_error(plain, truth), rounding))


def assert_accurate(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Raises AssertionError with both errors unless `new` obeys the error rule."""
    report = compare(new, plain, truth)
    assert report.ok, f"{what}: {report}"


class SimulationError(AssertionError):
    """A check of the simulated GPU failed; the message names the kernel, the line of PTX, the block and the thread."""


@dataclass(frozen=True)
class SimulatedGpu:
    """What can be asked of the simulator while, or after, kernels ran on it."""

    simulator: ctypes.CDLL

    def _text(self, function: str) -> str:
        call = getattr(self.simulator, function)
        call.restype = ctypes.c_char_p
        return str(call().decode())

    def take_launches(self) -> list[dict[str, Any]]:
        """One entry per kernel launch since the last call: its name, and what was counted (instructions, bytes, bank conflicts)."""
        launches: list[dict[str, Any]] = json.loads(self._text("gpusim_take_launches"))
        return launches

    def take_error(self) -> str:
        return self._text("gpusim_take_error")

    def kernels(self) -> list[str]:
        """Mangled names of all kernels in the libraries that are loaded."""
        return sorted(set(self._text("gpusim_kernels").split()))


@contextmanager
def simulated_gpu(folder: Path, architecture: int = 90, **settings: str | int) -> Iterator[SimulatedGpu]:
    """Inside, the ops on CPU tensors run the CUDA kernels, on a simulated GPU of compute capability 8.0 or 9.0.

    folder: where `python -m build_tools.gpusim` put libgpusim.so and libmoe_cuda_sim.so. settings: SCHED, ASYNC, RACE and the others
    of tests/gpusim/README.md. Tensors must be made inside: their memory is what the simulated device has.
    """
    if torch.version.cuda is not None:
        raise RuntimeError("simulated_gpu() needs a CPU build of torch: the simulator has the names of the CUDA runtime")
    simulator = ctypes.CDLL(str(folder / "libgpusim.so"))
    kernels = ctypes.CDLL(str(folder / "libmoe_cuda_sim.so"))
    ops = ctypes.CDLL(str(Path(__file__).parent / "libmoe_cpu.so"))
    kernels.moe_simulated_kernel_table.restype = ctypes.c_void_p
    ops.moe_replace_kernel_table.restype = ctypes.c_void_p
    ops.moe_replace_kernel_table.argtypes = [ctypes.c_void_p]
    variables = {f"GPUSIM_{name}": str(value) for name, value in settings.items()}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    simulator.gpusim_set_architecture(architecture)
    if not simulator.gpusim_watch(b"libc10.so", 1):
        raise RuntimeError("torch's CPU allocator was not found, so the simulator cannot know where tensors lie")
    gpu = SimulatedGpu(simulator)
    gpu.take_error()
    previous = ops.moe_replace_kernel_table(kernels.moe_simulated_kernel_table())
    try:
        yield gpu
    except RuntimeError as error:
        if message := gpu.take_error():
            raise SimulationError(message) from error
        raise
    finally:
        ops.moe_replace_kernel_table(previous)
        simulator.gpusim_watch(b"libc10.so", 0)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if message := gpu.take_error():
        raise SimulationError(message)

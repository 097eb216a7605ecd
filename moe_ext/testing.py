"""The error rule, for our tests and for yours; and a simulated GPU to run the CUDA kernels on where there is none.

A result is accepted if its error against the float64 truth is at most twice the error of plain PyTorch in the same dtype. There is no
tolerance: the yardstick is measured on the same inputs. Where plain PyTorch happens to be exact (an identity, a copy, a sum of one
term), the yardstick is the rounding of the truth to that dtype.
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
    """Two errors against the same truth, relative in the Euclidean norm: `|x - truth| / |truth|` (absolute if the truth is zero).

    Attributes:
        new: The error of the result that is judged.
        plain: The error of plain PyTorch in the same dtype.
    """

    new: float
    plain: float

    @property
    def ok(self) -> bool:
        """Whether the new error is at most twice the plain one."""
        return self.new <= ERROR_RATIO * self.plain

    @property
    def ratio(self) -> float:
        """The new error as a multiple of the plain one."""
        return self.new / self.plain if self.plain else (0.0 if self.new == 0 else float("inf"))

    def __str__(self) -> str:
        return f"error {self.new:.3e} against plain PyTorch's {self.plain:.3e} (ratio {self.ratio:.2f}, allowed {ERROR_RATIO:g})"


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Measures `|x - truth| / |truth|` in float64.

    Args:
        x: The result.
        truth: A tensor of the same shape.

    Returns:
        The error. Infinity if x has a NaN.

    Raises:
        ValueError: If the shapes differ.
    """
    x, truth = x.detach().double(), truth.detach().double()
    if x.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(truth.shape)}")
    if x.numel() == 0:
        return 0.0
    scale = truth.norm().item()
    error = (x - truth).norm().item() / (scale or 1.0)
    return error if error == error else float("inf")


def compare(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> ErrorReport:
    """Measures two results against the truth.

    Args:
        new: The result that is judged.
        plain: The result of plain PyTorch, in the same dtype.
        truth: The result in float64.

    Returns:
        Both errors.

    Raises:
        ValueError: If the dtypes of new and plain differ, or the shapes.
    """
    if new.dtype != plain.dtype:
        raise ValueError(f"dtypes differ: new {new.dtype}, plain {plain.dtype}")
    rounding = relative_error(truth.to(new.dtype), truth)
    return ErrorReport(relative_error(new, truth), max(relative_error(plain, truth), rounding))


def assert_accurate(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Raises an error unless `new` obeys the error rule.

    Args:
        new: The result that is judged.
        plain: The result of plain PyTorch, in the same dtype.
        truth: The result in float64.
        what: The name of the result in the message.

    Raises:
        AssertionError: If the error of new is more than twice that of plain. The message states both.
    """
    report = compare(new, plain, truth)
    assert report.ok, f"{what}: {report}"


class SimulationError(AssertionError):
    """A check of the simulated GPU failed. The message names the kernel, the line of PTX, the block and the thread."""


@dataclass(frozen=True)
class SimulatedGpu:
    """What the simulator can be asked, while or after kernels ran on it.

    Attributes:
        simulator: The loaded library of the simulator.
    """

    simulator: ctypes.CDLL

    def _text(self, function: str) -> str:
        call = getattr(self.simulator, function)
        call.restype = ctypes.c_char_p
        return str(call().decode())

    def take_launches(self) -> list[dict[str, Any]]:
        """Returns an entry for each kernel launch since the last call: its name, and the instructions, bytes and bank conflicts counted."""
        launches: list[dict[str, Any]] = json.loads(self._text("gpusim_take_launches"))
        return launches

    def take_error(self) -> str:
        """Returns the message of the first failed check since the last call, or an empty string."""
        return self._text("gpusim_take_error")

    def kernels(self) -> list[str]:
        """Returns the mangled names of all kernels in the loaded libraries."""
        return sorted(set(self._text("gpusim_kernels").split()))


@contextmanager
def simulated_gpu(folder: Path, architecture: int = 90, **settings: str | int) -> Iterator[SimulatedGpu]:
    """Runs the CUDA kernels on a simulated GPU: inside the `with` statement, ops on CPU tensors run them.

    Tensors must be made inside: their memory is the memory of the simulated device.

    Args:
        folder: Where `libgpusim.so` and `libmoe_cuda_sim.so` are: `python -m tools.gpusim_build` puts them there.
        architecture: The compute capability: 80 or 90.
        **settings: SCHED, ASYNC, RACE and the others of tests/gpusim/README.md.

    Yields:
        What the simulator can be asked.

    Raises:
        RuntimeError: If torch is a CUDA build: the simulator has the names of the CUDA runtime.
        SimulationError: If a check of the simulator failed inside.
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

"""What a benchmark or test asks of its device, once for CUDA and once for the CPU.

The CPU class is a trial of the program on a machine without a GPU: the same calls, a clock of the host in place of CUDA events, a
plain call in place of a graph. Everything made with it says device "cpu" and is no measurement.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


class Device:
    kind: str

    def machine(self) -> dict[str, Any]:
        """What results depend on beside the sources; equal on two runs whose figures may be put side by side."""
        raise NotImplementedError

    def driver(self) -> str:
        return "none"

    def synchronize(self) -> None:
        """Waits; raises what a kernel did wrong."""

    def milliseconds(self, call: Call, count: int) -> float:
        """Of one call, over `count` calls in a row."""
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - begin) / count

    def capture(self, call: Call) -> tuple[Call, Any]:
        """(replay, results): replay() computes again, into the same results, from what the inputs hold then."""
        results = call()

        def replay() -> None:
            again = tensors(call())
            with torch.no_grad():
                for old, new in zip(tensors(results), again, strict=True):
                    old.copy_(new)

        return replay, results

    def side_stream(self) -> AbstractContextManager[Any]:
        """Work inside runs on a stream of its own, after all work before; leaving waits for it."""
        return nullcontext()

    def no_host_synchronisation(self) -> AbstractContextManager[Any]:
        """Inside, an operator that waits for the device raises."""
        return nullcontext()

    def peak_bytes(self, call: Call) -> int | None:
        """Most bytes of tensors alive during `call`, beyond those before it."""
        from moe_ext.cli.memory import peak_bytes

        return peak_bytes(call)

    def fill_free_memory_with_nan(self) -> None:
        """So that memory which is given out and never written is seen."""


class Cpu(Device):
    kind = "cpu"

    def machine(self) -> dict[str, Any]:
        return {"gpu": "none", "cores": os.cpu_count()}


class Cuda(Device):
    kind = "cuda"

    def __init__(self) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def machine(self) -> dict[str, Any]:
        p = torch.cuda.get_device_properties(0)
        return {
            "gpu": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1), "cores": os.cpu_count(), "processor": platform.machine(),
            "torch": torch.__version__,
        }  # fmt: skip

    def driver(self) -> str:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout.split() else "unknown"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, call: Call, count: int) -> float:
        begin, end = self.events
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def capture(self, call: Call) -> tuple[Call, Any]:
        with self.side_stream():
            for _ in range(3):  # loads kernels and fills the allocator: neither may happen during a capture
                call()
        graph = torch.cuda.CUDAGraph()
        # On the stream of the caller, where that is not the default one: a backward runs on the stream of its forward.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, stream=None if stream == torch.cuda.default_stream() else stream):
            results = call()
        return graph.replay, results

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            yield  # is on one
            return
        stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)

    @contextmanager
    def no_host_synchronisation(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def peak_bytes(self, call: Call) -> int | None:
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def fill_free_memory_with_nan(self) -> None:
        sizes = [2**28, 2**26, 2**24, *(2**k for k in range(6, 22) for _ in range(4))]
        blocks = [torch.full((size,), float("nan"), device="cuda") for size in sizes]
        self.synchronize()
        del blocks


def device_named(kind: str) -> Device:
    return Cuda() if kind == "cuda" else Cpu()

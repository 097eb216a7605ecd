"""Writes down what the simulator computes in tests/test_gpusim.py: `python tests/gpusim/record.py`, after a change to instructions.cu.

Every call of a `run...` method of Instructions that succeeds in a test that passes is kept, with its tensors before and after, in
recorded/instructions.json. tests/gpu/test_instructions_on_gpu.py repeats those calls on a GPU: a method has the name and the arguments of
the function of instructions.cu that it calls.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "instructions.cu"
FILE = HERE / "recorded" / "instructions.json"

Call = dict[str, Any]  # architecture ("80", "90a"), method, before: arguments, after: the tensors among them


def pack(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    data = zlib.compress(value.contiguous().view(torch.uint8).numpy().tobytes(), 9)
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": base64.b64encode(data).decode()}


def unpack(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    data = bytearray(zlib.decompress(base64.b64decode(value["data"])))
    return torch.frombuffer(data, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])


def source_digest() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


class Recorder:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.of_test: list[Call] = []

    def watch(self, instructions: type, method: str) -> None:
        original: Callable[..., str] = getattr(instructions, method)

        def watched(this: Any, *given: Any) -> str:
            bound = inspect.signature(original).bind(this, *given)
            bound.apply_defaults()
            args = bound.args[1:]
            before = [pack(a) for a in args]
            message = original(*bound.args)
            if message == "":
                architecture = "90a" if this.architecture == 90 else str(this.architecture)
                after = [pack(a) for a in args if isinstance(a, Tensor)]
                self.of_test.append({"architecture": architecture, "method": method, "before": before, "after": after})
            return message

        setattr(instructions, method, watched)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            for call in self.of_test if report.passed else ():
                key = json.dumps([call["architecture"], call["method"], call["before"]])
                if self.calls.setdefault(key, call)["after"] != call["after"]:
                    raise AssertionError(f"{report.nodeid}: {call['before'][0]} gives other results for the same inputs")
            self.of_test = []


def main() -> int:
    import pytest

    sys.path[:0] = [str(HERE.parent)]
    from gpusim.harness import Instructions

    recorder = Recorder()
    for method in [name for name in vars(Instructions) if name.startswith("run")]:
        recorder.watch(Instructions, method)
    status = pytest.main(["-q", "-x", str(HERE.parent / "test_gpusim.py")], plugins=[recorder])
    if status == 0:
        calls = list(recorder.calls.values())
        FILE.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(call) for call in calls)
        FILE.write_text(f'{{"source": "{source_digest()}", "calls": [\n{lines}\n]}}\n')
        print(f"wrote {len(calls)} calls to {FILE.relative_to(HERE.parents[1])}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

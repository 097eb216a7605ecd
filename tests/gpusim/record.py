"""Writes down what the simulator computes in test_gpusim.py: `python -m tests.gpusim.record`, after a change to a file in SOURCES.

Every call of Instructions.run that succeeds in a test that passes is kept, with its tensors before and after, in
recorded/instructions.json, but for those of kernels broken on purpose. tests/gpu/test_instructions_on_gpu.py repeats them on a GPU.
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
SOURCES = ("instructions.cu", "instructions_sm90.cu")
FILE = HERE / "recorded" / "instructions.json"

Call = dict[str, Any]  # source, architecture ("80", "90a"), before: arguments, after: the tensors among them


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
    return hashlib.sha256(b"".join((HERE / source).read_bytes() for source in SOURCES)).hexdigest()[:16]


class Recorder:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.of_test: list[Call] = []

    def watch(self, instructions: type) -> None:
        original: Callable[..., str] = instructions.run  # type: ignore[attr-defined]

        def watched(this: Any, *given: Any, **named: Any) -> str:
            bound = inspect.signature(original).bind(this, *given, **named)
            bound.apply_defaults()
            *args, change = bound.args[1:]
            before = [pack(a) for a in args]
            message = original(*bound.args)
            if message == "" and not change:
                architecture = "90a" if this.architecture == 90 else str(this.architecture)
                after = [pack(a) for a in args if isinstance(a, Tensor)]
                self.of_test.append({"source": this.source, "architecture": architecture, "before": before, "after": after})
            return message

        instructions.run = watched  # type: ignore[attr-defined]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            for call in self.of_test if report.passed else ():
                key = json.dumps([call["source"], call["architecture"], call["before"]])
                if self.calls.setdefault(key, call)["after"] != call["after"]:
                    raise AssertionError(f"{report.nodeid}: {call['before'][0]} gives other results for the same inputs")
            self.of_test = []


def main() -> int:
    import pytest

    from tests.gpusim.harness import Instructions

    recorder = Recorder()
    recorder.watch(Instructions)
    status = pytest.main(["-q", "-x", str(HERE / "test_gpusim.py")], plugins=[recorder])
    if status == 0:
        calls = list(recorder.calls.values())
        FILE.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(call) for call in calls)
        FILE.write_text(f'{{"source": "{source_digest()}", "calls": [\n{lines}\n]}}\n')
        print(f"wrote {len(calls)} calls to {FILE.relative_to(HERE.parents[1])}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

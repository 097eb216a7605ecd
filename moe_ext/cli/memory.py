"""How much memory a call takes: for the demo and the benchmarks."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes of tensors alive at the peak of a call, beyond what was alive before it: activations and gradients of a step, for example.

    Counted by PyTorch's own profiler from each allocation and release; None where it was built without.
    """
    if not torch.profiler.kineto_available():
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it writes about itself to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    alive = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak

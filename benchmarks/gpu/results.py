"""The result file of one phase: written after every case, so that a run which is cut short leaves what it measured.

{phase, device, digest, sources {path: digest}, machine, versions, runs [{date, arguments, seconds, finished, library}],
results {key: record}, left_out {key: reason}}
Runs of the same sources on the same machine add up; anything else begins a new file, and leaves the old one beside it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.status import last_date, source_digests
from benchmarks.gpu.supervise import ROOT
from build_tools.sources import digest

PACKAGES = ("transformers", "triton", "liger-kernel", "scattermoe", "sonic-moe", "quack-kernels", "nvidia-cutlass-dsl", "pytest")
Record = dict[str, Any]
Render = Callable[[Record], str]


def versions(device: Device) -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version(), "driver": device.driver()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def library() -> Record:
    """The CUDA library that runs: its digest, that of the sources it says it is made of, and sources that are newer than it."""
    path = ROOT / "moe_ext" / "libmoe_cuda.so"
    if not path.exists():
        return {"sha256": None, "sources": None, "older_than": []}
    describe = ctypes.CDLL(str(path)).moe_describe
    describe.restype = ctypes.c_char_p
    made_of = json.loads(describe()).get("cuda_sources")
    newer = [name for name in source_digests() if (ROOT / name).stat().st_mtime > path.stat().st_mtime]
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "sources": made_of, "older_than": newer}


class ResultFile:
    """`gpu-PHASE.json` in `folder`, and one more file for each of `renders` (suffix to text), kept up to date."""

    def __init__(self, folder: Path, phase: str, device: Device, renders: dict[str, Render] | None = None) -> None:
        self.path, self.renders = folder / f"gpu-{phase}.json", renders or {}
        sources, ran = source_digests(), library()["sources"]
        if ran not in (None, digest(sources)):
            sources = {}  # the library is made of others than lie here
        self.data: Record = {
            "phase": phase, "device": device.kind, "digest": ran or digest(sources), "machine": device.machine(),
            "versions": versions(device),
            "runs": [], "left_out": {}, "results": {}, "sources": sources,
        }  # fmt: skip
        self.displaced = self._merge()

    def _merge(self) -> str | None:
        """Takes over an existing file of the same sources and machine. Another one is given a name with its date; why, in words."""
        if not self.path.exists():
            return None
        old = json.loads(self.path.read_text())
        for name in ("device", "digest", "machine"):
            if old[name] != self.data[name]:
                date = "".join(c for c in last_date(old) if c.isdigit())
                other = self.path.with_name(f"{self.path.stem}-{date}.json")
                self.path.rename(other)
                return f"{self.path.name} becomes {other.name}: its {name} is {old[name]}, now it is {self.data[name]}"
        self.data |= {name: old[name] for name in ("runs", "left_out", "results")}
        self.data["versions"] = old["versions"] | self.data["versions"]
        return None

    def begin(self, arguments: list[str]) -> None:
        self.started = time.monotonic()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        run = {"date": date, "arguments": arguments, "seconds": 0.0, "finished": False, "library": library()}
        self.data["runs"].append(run)
        self.write()

    def resume(self) -> None:
        """Goes on with the run that another process began."""
        self.started = time.monotonic() - self.data["runs"][-1]["seconds"]

    def record(self, key: str, value: Record) -> None:
        self.data["results"][key] = value
        self.data["left_out"].pop(key, None)
        self.write()

    def leave_out(self, key: str, reason: str) -> None:
        """Unless an earlier run has it."""
        if key not in self.data["results"]:
            self.data["left_out"][key] = reason
            self.write()

    def finish(self) -> None:
        self.data["runs"][-1]["finished"] = True
        self.write()

    def write(self) -> None:
        self.data["runs"][-1]["seconds"] = round(time.monotonic() - self.started, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        texts = {".json": json.dumps(self.data, indent=1) + "\n"} | {suffix: render(self.data) for suffix, render in self.renders.items()}
        for suffix, text in texts.items():
            target = self.path.with_suffix(suffix)
            part = target.with_name(target.name + ".part")
            part.write_text(text)
            os.replace(part, target)  # whoever is killed leaves the old file or the new one

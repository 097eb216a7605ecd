"""The correctness phase: tests/gpu in several processes, each of which may be lost without losing the others' tests.

Tests that have not passed yet come first, so several short runs add up to a whole one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Device
from benchmarks.gpu.results import ResultFile
from benchmarks.gpu.supervise import ROOT, Deadline, search_path, supervise

SILENCE = 200  # seconds: the longest tests compile small kernels or start a sanitizer
PYTEST_ENDED = (0, 1, 2, 5)  # passed, some failed, stopped because the time was up, no tests in this share


@dataclass
class Tests:
    """What pytest is asked to run, in how many processes at a time."""

    paths: tuple[str, ...] = ("tests/gpu",)
    processes: int = 4


def run(tests: Tests, device: Device, file: ResultFile, deadline: Deadline) -> None:
    passed = [test for test, record in file.data["results"].items() if record["outcome"] == "passed"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(tests.processes) as pool:
        shares = []
        for number in range(tests.processes):
            folder = Path(name) / str(number)
            folder.mkdir()
            task = {"outcomes": str(folder / "outcomes"), "share": number, "shares": tests.processes, "passed": passed}
            shares.append((folder, pool.submit(run_share, tests, device, folder, task, deadline)))
        try:
            while not all(worker.done() for _, worker in shares):
                for folder, _ in shares:
                    absorb(folder / "outcomes", file)
                time.sleep(0.5)
        except BaseException:
            deadline.end = float("-inf")  # ends the workers; the pool waits for them
            raise
        for folder, worker in shares:
            absorb(folder / "outcomes", file)
            conclude(folder / "outcomes", worker.result(), file)


def run_share(tests: Tests, device: Device, folder: Path, task: dict[str, object], deadline: Deadline) -> dict[str, str]:
    environ = {"MOE_GPU_DEVICE": device.kind, **search_path()}

    def command(seconds: float) -> list[str]:
        environ["MOE_GPU_SHARE"] = json.dumps(task | {"seconds": seconds})
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.recorder", "-o", "addopts=--strict-markers"]
        return [sys.executable, "-m", "pytest", *(str(ROOT / path) for path in tests.paths), "--rootdir", str(ROOT), *options]

    return supervise(command, folder, deadline, SILENCE, environ, ended=PYTEST_ENDED)


def absorb(outcomes: Path, file: ResultFile) -> None:
    """Takes over what a share has written by now."""
    for test, record in seen(outcomes).items():
        if file.data["results"].get(test) != record:
            file.record(test, record)


def conclude(outcomes: Path, lost: dict[str, str], file: ResultFile) -> None:
    """What a share was lost in has failed; what it did not come to is left out."""
    if reason := lost.pop("start", None):
        file.leave_out("tests", f"pytest did not run: {reason}")
    for test, reason in lost.items():
        said = seen(outcomes).get(test, {}).get("message")  # it failed, and took the process along
        file.record(test, {"outcome": "failed", "seconds": None, "message": f"{said}\n{reason}" if said else reason})
    for test in {test for line in lines(outcomes) for test in line.get("collected", ())} - set(seen(outcomes)) - set(lost):
        file.leave_out(test, "no time was left")


def lines(outcomes: Path) -> list[dict[str, Any]]:
    """Whole lines only: another process is writing."""
    return [json.loads(line) for line in outcomes.read_text().splitlines() if line.endswith("}")] if outcomes.exists() else []


def seen(outcomes: Path) -> dict[str, dict[str, Any]]:
    return {line["test"]: {name: line[name] for name in ("outcome", "seconds", "message")} for line in lines(outcomes) if "test" in line}

"""Runs a worker process that may be lost to a faulty kernel, and starts it again without what it was lost in.

The worker writes the name of what it begins into a file (`announce`). When it dies, or says nothing for too long, that name and the
reason go onto the list of what is abandoned, which the worker reads at its start (`abandoned`), and the next worker goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "MOE_GPU_WORKER"  # the folder of the two files
#: A worker's own exit codes: done, and "the device no longer answers; start me again".
DONE, LOST = 0, 75
#: Seconds beyond the deadline for a worker that stops by itself, and for one that is told to stop, twice.
RESERVE, STOPPING = 10.0, 5.0


def search_path(brought: Path | None = None) -> dict[str, str]:
    """The variable with which a child process finds this repository's modules, and packages brought along before installed ones."""
    folders = [str(ROOT), *([str(brought.resolve())] if brought else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(folders)}


def announce(name: str) -> None:
    """Says what is begun; the name of a worker without a supervisor goes nowhere."""
    if folder := os.environ.get(VARIABLE):
        (Path(folder) / "begun").write_text(name)


def abandoned() -> dict[str, str]:
    """What must not be tried again, and why."""
    path = Path(os.environ.get(VARIABLE, ".")) / "abandoned.json"
    return dict(json.loads(path.read_text())) if VARIABLE in os.environ and path.exists() else {}


class Deadline:
    """A point in time; workers are given what is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def supervise(
    command: Callable[[float], Sequence[str]],
    folder: Path,
    deadline: Deadline,
    silence: float,
    environ: Mapping[str, str],
    ended: Sequence[int] = (DONE,),
) -> dict[str, str]:
    """Runs `command(seconds left)` until it ends by itself or the time is up; what was abandoned, and why.

    silence: seconds without a new announcement after which a worker counts as hanging. ended: exit codes of one that came to its end.
    `folder` is empty and the worker's own.
    """
    begun, given_up = folder / "begun", folder / "abandoned.json"
    lost: dict[str, str] = {}
    while deadline.left > 1:
        begun.write_text("")
        worker = start(command(deadline.left), env={**os.environ, **environ, VARIABLE: str(folder)})
        try:
            reason = _watch(worker, begun, deadline, silence, ended)
        finally:
            stop(worker)
        name = begun.read_text()
        if reason is None or deadline.left <= 1:
            break
        if not name or name in lost:
            lost[name or "start"] = reason  # it does not come further
            break
        lost[name] = reason
        given_up.write_text(json.dumps(lost))
        print(f"{name}: {reason}; going on with the rest", file=sys.stderr, flush=True)
    return lost


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """In a process group of its own, but in this session: it can be stopped with its children, and goes when the session does."""
    group: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    return subprocess.Popen(command, **group, **options)


def stop(worker: subprocess.Popen[Any]) -> None:
    """With its children, if it has not ended."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if worker.poll() is None:
            os.killpg(worker.pid, sign)
            try:
                worker.wait(timeout=STOPPING)
            except subprocess.TimeoutExpired:
                continue


def _watch(worker: subprocess.Popen[Any], begun: Path, deadline: Deadline, silence: float, ended: Sequence[int]) -> str | None:
    """None when the worker ended by itself, or was stopped because the time is up; else how it was lost."""
    while True:
        try:
            code = worker.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if deadline.left < -RESERVE:
                return None
            if time.time() - begun.stat().st_mtime > silence:
                return f"no answer in {silence:.0f} s"
            continue
        if code in ended:
            return None
        if code == LOST:
            return "the device no longer answers after it"
        return f"the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

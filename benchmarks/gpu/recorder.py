"""A pytest plugin for correctness.py: writes each outcome as it happens, does its share of the tests, and stops in time.

MOE_GPU_SHARE: a JSON object with `outcomes` (the file to append to), `share` and `shares` (which tests are this process's),
`passed` (tests that go last), `seconds` (how long there is). A test in which an earlier process was lost is not run again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.supervise import LOST, abandoned, announce

SHARE: dict[str, Any] = json.loads(os.environ["MOE_GPU_SHARE"])
END = time.monotonic() + SHARE["seconds"]
MESSAGE_LINES = 12


def write(**line: Any) -> None:
    with Path(SHARE["outcomes"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done, lost, passed = written(), abandoned(), set(SHARE["passed"])
    mine = [item for number, item in enumerate(items) if number % SHARE["shares"] == SHARE["share"]]
    todo = [item for item in mine if item.nodeid not in done and item.nodeid not in lost]
    items[:] = sorted(todo, key=lambda item: item.nodeid in passed)
    write(collected=[item.nodeid for item in mine])


def written() -> set[str]:
    path = Path(SHARE["outcomes"])
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["test"] for line in lines if "test" in line}


def pytest_runtest_logstart(nodeid: str) -> None:
    announce(nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if time.monotonic() > END:
        item.session.shouldstop = "no time was left"
    return (yield)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "failed":
        write(test=report.nodeid, outcome="failed", seconds=0.0, message=str(report.longrepr)[-600:])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":  # a failed or skipped setup has no call
        write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), message=message(report))
    torch = sys.modules.get("torch")
    if report.outcome == "failed" and torch and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # after an illegal access every later call of this process fails
            os._exit(LOST)


def message(report: pytest.TestReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return "\n".join(str(crash.message if crash else report.longrepr).splitlines()[:MESSAGE_LINES])

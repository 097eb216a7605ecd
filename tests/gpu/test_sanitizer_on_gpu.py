"""compute-sanitizer finds no access out of bounds or misaligned, and no race on shared memory, in the ops on small cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.gpu.on_gpu import KIND, ROOT, needs_gpu

pytestmark = needs_gpu

PROGRAM = [sys.executable, "-m", "tests.gpu.sanitized", KIND]
SECONDS = 180
FOUND = 97  # what it is asked to end with when it finds something


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Without the caching allocator each tensor is an allocation of its own, whose bounds are known to the tool.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=SECONDS)


def test_the_program_itself_runs() -> None:
    done = run(PROGRAM)
    assert done.returncode == 0 and "all of it ran" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool: str) -> None:
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    if tool == "memcheck":  # what torch asks the CUDA runtime in vain, such as for peers of a single GPU, is no access to memory
        options += ["--report-api-errors", "no"]
    done = run(["compute-sanitizer", *options, *PROGRAM])
    said = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, f"{'found something' if done.returncode == FOUND else 'did not run'}:\n{said}"
    assert "all of it ran" in done.stdout, said

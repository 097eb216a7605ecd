"""benchmarks.gpu.run in a checkout without libraries: it builds first, or takes the libraries that were brought along."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe_ext
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import supervise
from benchmarks.gpu.supervise import Deadline

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(moe_ext.__file__).parent
TRIAL = ("--device", "cpu", "--quick", "--only", "profile", "--seconds", "60")
#: Takes the place of setup.py: what a build does, in no time.
BUILD = """
import os, shutil, sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"] and os.environ["MOE_EXT_CUDA"] == "0"
shutil.copy(LIBRARY, "moe_ext")
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The Python files of the project, and no library."""
    for folder in ("moe_ext", "benchmarks", "build_tools", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    return tmp_path


def run_in(folder: Path, *arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "benchmarks.gpu.run"]
    environ = {name: value for name, value in os.environ.items() if name not in ("MOE_EXT_CUDA", "PYTHONPATH")}
    environ |= {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *program, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300)


def test_T141_the_help_needs_neither_libraries_nor_torch(bare: Path) -> None:
    done = run_in(bare, "--help")
    assert done.returncode == 0 and "--peers" in done.stdout, done.stderr
    without = "import runpy, sys; sys.modules |= {'torch': None, 'moe_ext': None}; sys.argv = ['run', '--help']; "
    done = run_in(bare, code=without + "runpy.run_module('benchmarks.gpu.run', run_name='__main__')")
    assert done.returncode == 0 and "--peers" in done.stdout, done.stderr


def test_T141_a_bare_checkout_is_built_first(bare: Path) -> None:
    (bare / "setup.py").write_text(f"LIBRARY = {str(PACKAGE / 'libmoe_cpu.so')!r}{BUILD}")
    done = run_in(bare, *TRIAL, "--out", str(bare / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "libmoe_cpu.so not found" in done.stdout and "profile: " in done.stdout
    assert (bare / "out" / "gpu-profile.json").exists()


def test_T141_libraries_that_were_brought_along_are_taken(bare: Path) -> None:
    (bare / "setup.py").write_text("raise SystemExit('nobody asked for a build')")
    shutil.copy(PACKAGE / "libmoe_cpu.so", bare / "moe_ext")
    done = run_in(bare, *TRIAL, "--out", str(bare / "out"))
    assert done.returncode == 0 and "not found" not in done.stdout, done.stdout + done.stderr
    both = {name: bare / "moe_ext" / name for name in gpu_run.LIBRARIES["cuda"]}
    assert gpu_run.missing_libraries("cuda", bare / "moe_ext") == [name for name, path in both.items() if not path.exists()]


def test_T141_a_build_that_fails_says_what_is_missing(bare: Path) -> None:
    (bare / "setup.py").write_text("raise SystemExit('there is no compiler')")
    done = run_in(bare, *TRIAL, "--out", str(bare / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no compiler" in done.stderr and "moe_ext/libmoe_cpu.so: not there, and could not be built" in done.stderr


# ---- time
def test_T141_a_build_that_takes_too_long_is_stopped_with_its_compilers(bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiler = "import pathlib, time; time.sleep(4); pathlib.Path('compiled').touch()"
    (bare / "setup.py").write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {compiler!r}])\n")
    begin = time.monotonic()
    assert gpu_run.build("cpu", Deadline(1), bare) == ["libmoe_cpu.so"]
    assert "longer than all of --seconds" in capfd.readouterr().err
    time.sleep(max(0.0, 6 - (time.monotonic() - begin)))
    assert not (bare / "compiled").exists()


def test_T141_a_worker_that_does_not_stop_is_stopped_after_its_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RESERVE", 1.0)
    begin = time.monotonic()
    assert supervise.supervise(lambda seconds: [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, Deadline(2), 60.0, {}) == {}
    assert 3 <= time.monotonic() - begin < 20
    assert supervise.supervise(lambda seconds: pytest.fail("no time was left"), tmp_path, Deadline(1), 60.0, {}) == {}


def test_T141_the_calls_that_the_page_shows_end_within_nine_minutes() -> None:
    """By their own deadline: the time that they are given, the reserve of the last worker, and what it takes to stop it."""
    calls = re.findall(r"^python -m benchmarks\.gpu\.run (--seconds.*)$", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE)
    assert len(calls) >= 2
    for call in calls:
        options = gpu_run.parse(shlex.split(call))
        assert options.seconds + supervise.RESERVE + 2 * supervise.STOPPING < 540
    assert gpu_run.parse(shlex.split(calls[0])).peers == ["grouped_mm", "transformers"], "the cheap ones first"

"""build_tools/environment.py: when CUDA is compiled, and when a build that is there serves. The commands are noted, not run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from build_tools import environment

ROOT = Path(__file__).resolve().parents[2]
WITH, WITHOUT = "CUDA", "no CUDA"


class Noted(environment.Environment):
    """Makes the libraries that setup.py would make, as empty files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.python, self.made = Path(sys.executable), list[str]()

    def run(self, *arguments: str, environ: Mapping[str, str] = environment.os.environ) -> None:
        if arguments[0] != "setup.py":
            return
        cuda = environment.wants_cuda(environ)
        self.made.append(WITH if cuda else WITHOUT)
        package = environment.ROOT / "moe_ext"
        (package / "libmoe_cpu.so").touch()
        (package / "libmoe_cuda.so").unlink(missing_ok=True)
        if cuda:
            (package / "libmoe_cuda.so").touch()

    def after(self, wherever_nvcc_is: bool = False) -> list[str]:
        """What one more call builds."""
        self.made.clear()
        self.build(wherever_nvcc_is)
        return list(self.made)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Noted:
    """A machine with nvcc and without an NVIDIA driver."""
    nvcc = tmp_path / "bin" / "nvcc"
    for folder in (nvcc.parent, tmp_path / "moe_ext", tmp_path / "venv"):
        folder.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: False)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    monkeypatch.delenv("MOE_EXT_CUDA", raising=False)
    return Noted(tmp_path / "venv")


def test_cuda_is_left_out_without_a_driver_and_one_line_says_so(here: Noted, capsys: pytest.CaptureFixture[str]) -> None:
    assert here.after() == [WITHOUT]
    (line,) = capsys.readouterr().out.splitlines()
    assert "no NVIDIA driver" in line and "MOE_EXT_CUDA=1" in line
    assert here.after() == []


def test_from_demo_to_test_and_back(here: Noted) -> None:
    assert here.after() == [WITHOUT]
    assert here.after(wherever_nvcc_is=True) == [WITH]
    assert here.after(wherever_nvcc_is=True) == []
    assert here.after() == []  # a build with CUDA serves the demo


def test_who_asks_gets_what_was_asked_for(here: Noted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOE_EXT_CUDA", "1")
    assert here.after() == [WITH]
    monkeypatch.setenv("MOE_EXT_CUDA", "0")
    assert here.after() == [WITHOUT] and here.after(wherever_nvcc_is=True) == []
    assert not (environment.ROOT / "moe_ext" / "libmoe_cuda.so").exists() and capsys.readouterr().out == ""


def test_with_a_driver_cuda_is_compiled(here: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: True)
    assert here.after() == [WITH]
    assert here.after(wherever_nvcc_is=True) == []


def test_without_nvcc_there_is_nothing_to_say(here: Noted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "wants_cuda", lambda environ: False)
    assert here.after() == [WITHOUT] and here.after(wherever_nvcc_is=True) == []
    assert capsys.readouterr().out == ""


def test_a_library_that_is_gone_is_built_again(here: Noted) -> None:
    assert here.after(wherever_nvcc_is=True) == [WITH]
    (environment.ROOT / "moe_ext" / "libmoe_cuda.so").unlink()
    assert here.after(wherever_nvcc_is=True) == [WITH]


def test_a_setting_that_is_not_understood_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment.Environment, "create", lambda *_: None)
    monkeypatch.setattr(environment.Environment, "install", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["environment", str(tmp_path), "--build"])
    monkeypatch.setenv("MOE_EXT_CUDA", "yes")
    assert environment.main() == 1
    assert "MOE_EXT_CUDA=yes is not understood" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "everywhere"), [("demo", False), ("build", False), ("test", True), ("gpu-counters", True)])
def test_targets_that_need_the_library_of_cuda_ask_for_it(target: str, everywhere: bool) -> None:
    said = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    builds = [line for line in said.splitlines() if "--build" in line]
    assert builds and all(("--cuda" in line) == everywhere for line in builds)

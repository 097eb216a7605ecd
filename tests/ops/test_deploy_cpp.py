"""examples/deploy_cpp: the C++ host is built, runs a scripted and a packaged module, and says clearly what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_ext import ops

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy_cpp"
COMPILER = os.environ.get("CXX", "g++")
TOKENS = (1, 3, 16, 100)

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which("make") is None, reason=f"needs make and a C++ compiler ({COMPILER})"
)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the host and what export.py wrote."""
    folder = tmp_path_factory.mktemp("deploy")
    variables = (f"OUT={folder}", f"PYTHON={sys.executable}", f"CXX={COMPILER}")
    result = run("make", "-C", EXAMPLE, "build", folder / "cases.pt", *variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning" not in result.stderr, result.stderr
    return folder


def test_host_runs_both_models_with_every_token_count(built: Path) -> None:
    result = run(built / "deploy", ops.CPU_LIBRARY, built)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [re.fullmatch(r" *(\d+) tokens: error of TorchScript .*, of AOTInductor .*: ok", x) for x in result.stdout.splitlines()]
    assert [line and int(line[1]) for line in lines] == list(TOKENS)


def test_host_sees_a_wrong_result(built: Path, tmp_path: Path) -> None:
    for name in ("model.ts", "model.pt2"):
        (tmp_path / name).symlink_to(built / name)
    cases = torch.load(built / "cases.pt")
    x, plain, truth = cases[1]
    cases[1] = (x, plain + 1, truth + 1)
    torch.save(cases, tmp_path / "cases.pt")
    result = run(built / "deploy", ops.CPU_LIBRARY, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert [line.rsplit(": ", 1)[1] for line in result.stdout.splitlines()] == ["ok", "WRONG", "ok", "ok"]


def test_host_without_the_library_says_how_to_get_it(built: Path, tmp_path: Path) -> None:
    missing = tmp_path / "libmoe_cpu.so"
    result = run(built / "deploy", missing, built)
    assert result.returncode == 2
    assert f"cannot load the op library: {missing}" in result.stderr and "pip install" in result.stderr
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    result = run(built / "deploy", other, built)
    assert result.returncode == 2
    assert "registers no moe::grouped_forward" in result.stderr and "pip install" in result.stderr


def test_host_without_models_says_how_to_make_them(built: Path, tmp_path: Path) -> None:
    result = run(built / "deploy", ops.CPU_LIBRARY, tmp_path)
    assert result.returncode == 2 and "run export.py first" in result.stderr
    assert run(built / "deploy").returncode == 2


def test_torch_alone_names_the_missing_op(built: Path) -> None:
    """The two messages that README.md quotes, in a process that has not loaded the library."""
    script = (
        "import sys, torch\n"
        "for load in (lambda: torch.jit.load(sys.argv[1] + '/model.ts'),\n"
        "             lambda: torch._inductor.aoti_load_package(sys.argv[1] + '/model.pt2')(torch.zeros(1, 64))):\n"
        "    try:\n"
        "        load()\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    result = run(sys.executable, "-W", "ignore", "-c", script, built)
    text = result.stdout + result.stderr
    assert "Unknown builtin op: moe::grouped_forward" in text, text
    assert "Could not find schema for moe::grouped_forward" in text, text

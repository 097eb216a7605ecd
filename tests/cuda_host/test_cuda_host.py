"""What the CUDA kernels compute besides products, compiled for the host: tiles of rows, the sort's plan, index maps of the
tensor-core tile, problems of a grouped GEMM, the choice of a kernel. Each program of this folder compares it with brute force.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
PROGRAMS = sorted(HERE.glob("*.cpp"))
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the programs with"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests"),
]


def run(program: Path, folder: Path, *flags: str) -> None:
    compiled = subprocess.run(["g++", *FLAGS, *flags, str(program), "-o", str(folder / "program")], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(folder / "program")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_agrees_with_brute_force(program: Path, tmp_path: Path) -> None:
    run(program, tmp_path)


@pytest.mark.parametrize("program", ["config", "grouped_down_backward"])
def test_choice_of_kernels_in_a_build_with_sm90(program: str, tmp_path: Path) -> None:
    run(HERE / f"{program}.cpp", tmp_path, "-DMOE_CUDA_SM90=1")

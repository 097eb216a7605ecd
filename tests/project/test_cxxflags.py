"""T135: CXXFLAGS of distributions and of debug builds do not stop the build."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from build_tools.checks import check_kernel_object
from build_tools.ninja_file import write_build_info
from build_tools.plan import make_plan
from build_tools.products import BUILD_FOLDER, Products

ROOT = Path(__file__).resolve().parents[2]
FEDORA = (
    "-O2 -flto=auto -ffat-lto-objects -fexceptions -g -grecord-gcc-switches -pipe -Wall -Werror=format-security "
    "-Wp,-U_FORTIFY_SOURCE,-D_FORTIFY_SOURCE=3 -Wp,-D_GLIBCXX_ASSERTIONS -fstack-protector-strong -fasynchronous-unwind-tables"
)
DEBIAN = "-g -O2 -ffile-prefix-map=/build=. -fstack-protector-strong -Wformat -Werror=format-security -Wdate-time -D_FORTIFY_SOURCE=2"


@pytest.mark.parametrize("flags", [FEDORA, DEBIAN, "-O0 -g", "-Og", "-O1 -flto"], ids=["fedora", "debian", "O0", "Og", "slim_lto"])
def test_T135_flags_of_others(flags: str, tmp_path: Path) -> None:
    """An instruction set's kernels define nothing that the linker could share, and an object with torch's headers compiles."""
    plan = make_plan(ROOT, "0", {**os.environ, "MOE_EXT_CUDA": "0"})
    write_build_info(plan, tmp_path)
    units = Products(plan, {"CXXFLAGS": flags}).cpu_library().units
    chosen = [u for u in units if (u.source.stem == "activation" and u.isa == plan.isas[-2]) or u.source.name == "describe.cpp"]
    assert len(chosen) == 2
    for unit in chosen:
        output = tmp_path / unit.output.name
        options = [flag.replace(f"{BUILD_FOLDER}/include", f"{tmp_path}/include") for flag in unit.flags]
        command = [*plan.compiler.command, *options, "-c", str(unit.source), "-o", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not unit.isa or check_kernel_object(output, unit.isa) == []

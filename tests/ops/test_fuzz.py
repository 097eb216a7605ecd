"""T130: no argument of any op makes it read or write outside of its tensors. The CPU library is built with AddressSanitizer, from
generic kernels alone, and 20,000 calls with right and wrong arguments (fuzz.py) run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from build_tools import ninja_file, toolchain
from build_tools.plan import make_plan
from build_tools.products import BUILD_FOLDER, Products

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("build") / "asan"
CALLS = 20_000
FLAGS = {"CXXFLAGS": "-O1 -g1 -fsanitize=address -fno-omit-frame-pointer", "LDFLAGS": "-fsanitize=address"}


def file_of_compiler(compiler: toolchain.Compiler, name: str) -> str:
    found = subprocess.run([compiler.program, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return str(Path(found).resolve()) if os.path.isabs(found) else ""


def build() -> Path:
    plan = replace(make_plan(ROOT, "0", {**os.environ, "MOE_EXT_CUDA": "0"}), isas=["generic"])
    product = Products(plan, FLAGS).cpu_library()
    text = ninja_file.ninja_text(plan, [product]).replace(str(BUILD_FOLDER), str(FOLDER))
    ninja_file.write_build_info(plan, ROOT / FOLDER)
    ninja_file.write_if_changed(ROOT / FOLDER / "build.ninja", text)
    done = subprocess.run([plan.ninja, "-f", str(FOLDER / "build.ninja")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / FOLDER / product.output.name


def test_T130_no_argument_reaches_outside_of_a_tensor() -> None:
    compiler = toolchain.find_compiler(os.environ)
    # libstdc++ beside it: the sanitizer looks for the function that throws before Python has loaded it.
    preloaded = [file_of_compiler(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    assert all(preloaded), f"{compiler.program} has no shared libasan.so: install gcc's sanitizer libraries, or set CXX to gcc"
    options = "detect_leaks=0:allocator_may_return_null=1"
    environ = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests/ops/fuzz.py"), str(build()), str(CALLS), "1"]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, cwd=ROOT / FOLDER)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    counts = [line.split() for line in done.stdout.splitlines()]
    assert sum(int(returned) + int(raised) for _, _, returned, _, raised in counts) == CALLS
    for name, _, returned, _, raised in counts:  # both happen to every op, so that the calls are worth something
        assert int(returned) > 100 and int(raised) > 10, (name, returned, raised)

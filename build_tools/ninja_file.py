"""Writes a plan as build.ninja, runs ninja, and checks what came out."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .checks import check_kernel_object, check_library
from .plan import Plan
from .products import BUILD_FOLDER, Product, Products
from .sources import digest, source_digests
from .toolchain import BuildError

# -MD, not -MMD: another torch or another toolkit in the same place must rebuild what includes it.
RULES = """\
builddir = {folder}

pool nvcc
  depth = {nvcc_jobs}

rule cxx
  command = {cxx} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out

rule nvcc
  command = {python} -m build_tools.run_nvcc $in $out -- {nvcc} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  pool = nvcc
  description = NVCC $out

rule link
  command = {cxx} -shared $in -o $out $flags
  description = LINK $out
"""


def escape(text: str) -> str:
    """For a value in a ninja file. Our own paths are relative to the repository and hold none of these characters."""
    return text.replace("$", "$$").replace("\n", "$\n")


def ninja_text(plan: Plan, products: list[Product]) -> str:
    nvcc = shlex.quote(str(plan.cuda.nvcc)) if plan.cuda else "nvcc"
    names = {"cxx": shlex.join(plan.compiler.command), "nvcc": nvcc, "python": shlex.quote(sys.executable)}
    lines = [RULES.format(folder=BUILD_FOLDER, nvcc_jobs=plan.nvcc_jobs, **{k: escape(v) for k, v in names.items()})]
    for product in products:
        for unit in product.units:
            # The checks are part of what nvcc's rule does, so a change to them runs it again.
            checks = " | build_tools/run_nvcc.py build_tools/checks.py" if unit.rule == "nvcc" else ""
            lines += [f"build {unit.output}: {unit.rule} {unit.source}{checks}", f"  flags = {escape(shlex.join(unit.flags))}"]
        objects = " ".join(str(u.output) for u in product.units)
        lines += [f"build {product.output}: link {objects}", f"  flags = {escape(shlex.join(product.link))}"]
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """An untouched file keeps its time, so that nothing that depends on it is rebuilt."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_build_info(plan: Plan, folder: Path) -> None:
    info = f"#pragma once\n#define MOE_BUILD_INFO {json.dumps(plan.build_info())}\n"
    info += f'#define MOE_CUDA_SOURCES "{digest(source_digests(plan.root))}"\n'
    write_if_changed(folder / "include" / "moe_build_info.h", info)


def build(plan: Plan, environ: Mapping[str, str], verbose: bool = False) -> list[Product]:
    products = Products(plan, environ).all()
    folder = plan.root / BUILD_FOLDER
    write_build_info(plan, folder)
    write_if_changed(folder / "build.ninja", ninja_text(plan, products))
    command = [plan.ninja, "-C", str(plan.root), "-f", str(BUILD_FOLDER / "build.ninja"), f"-j{plan.jobs}", *(["-v"] if verbose else [])]
    if subprocess.run(command).returncode:
        raise BuildError(
            "The compilation failed; the first message above that starts with FAILED names the file, and what follows it the reason."
        )
    complaints = [c for p in products if p.name != "_C" for c in check_library(plan.root / p.output)]
    complaints += [c for p in products for u in p.units if u.isa for c in check_kernel_object(plan.root / u.output, u.isa)]
    if complaints:
        raise BuildError("\n".join(complaints))
    return products

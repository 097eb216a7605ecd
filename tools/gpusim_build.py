"""Builds the PTX simulator and the CUDA kernels linked against it: `python -m tools.gpusim_build`, or `build()` from a test.

libgpusim.so         tests/gpusim: a stand-in for the CUDA runtime that executes the PTX of a fat binary on the CPU
libmoe_cuda_sim.so   csrc/kernels/cuda, compiled to PTX only and linked against it; exports the kernel table and nothing else
Both lie in build/gpusim and are made again only when something they depend on has changed.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_tools import toolchain
from build_tools.ninja_file import write_if_changed
from build_tools.plan import read_jobs
from build_tools.products import NVCC_FLAGS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("build") / "gpusim"
SIMULATOR_FLAGS = (
    *("-std=c++20", "-O2", "-g1", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"),
    # Registers are read as several types, and each PTX instruction rounds as it says.
    *("-fno-strict-aliasing", "-ffp-contract=off", "-frounding-math", "-fno-math-errno"),
)
HOST_FLAGS = ("-std=c++20", "-O1", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Icsrc")
PTX_TARGETS = ("80", "90a")
# PTX only, and readable: no ptxas run, no compression.
PTX_FLAGS = tuple(f for f in NVCC_FLAGS if f not in ("-Xptxas", "-v")) + ("--no-compress", "-Xcompiler", "-fPIC,-fvisibility=hidden")

RULES = """\
builddir = {folder}
pool nvcc
  depth = 1
rule cxx
  command = {cxx} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  pool = nvcc
rule link
  command = {cxx} -shared $in -o $out $flags
"""


@dataclass(frozen=True)
class Libraries:
    simulator: Path
    kernels: Path | None  # None without nvcc


def gencode(stem: str) -> list[str]:
    """*_sm90 files exist for 9.0a only, all others for both."""
    targets = PTX_TARGETS[1:] if stem.endswith("_sm90") else PTX_TARGETS
    return [flag for t in targets for flag in ("-gencode", f"arch=compute_{t},code=compute_{t}")]


def simulator_lines(lines: list[str]) -> None:
    objects = []
    for source in sorted((ROOT / "tests/gpusim").glob("*/*.cpp")):
        output = FOLDER / f"{source.parent.name}_{source.stem}.o"
        objects.append(str(output))
        lines += [f"build {output}: cxx {source.relative_to(ROOT)}", f"  flags = {shlex.join(SIMULATOR_FLAGS)}"]
    lines += [f"build {FOLDER}/libgpusim.so: link {' '.join(objects)}", "  flags = -Wl,-soname,libgpusim.so -Wl,-z,defs -ldl"]


def kernel_sources() -> list[Path]:
    """Without CUTLASS, what needs it is left out; the library then chooses its other kernels, as for a device without wgmma. No device
    above 9.0 is simulated."""
    sources = sorted(s for s in (ROOT / "csrc/kernels/cuda").glob("*.cu") if not s.stem.endswith("_sm100"))
    try:
        toolchain.find_cutlass(os.environ, ROOT)
    except toolchain.BuildError:
        sources = [s for s in sources if not s.stem.endswith("_sm90")]
    return sources


def cuda_flags(cuda: toolchain.Cuda, compiler: toolchain.Compiler) -> list[str]:
    flags = [*PTX_FLAGS, "-ccbin", compiler.program]
    if any(s.stem.endswith("_sm90") for s in kernel_sources()):
        flags += ["-diag-suppress", "2908", "-isystem", str(toolchain.find_cutlass(os.environ, ROOT).include)]
    return flags


def kernel_lines(lines: list[str], cuda: toolchain.Cuda, compiler: toolchain.Compiler) -> None:
    objects = []
    sources = kernel_sources()
    families = ["-DMOE_CUDA_SM90=1"] if any(s.stem.endswith("_sm90") for s in sources) else []
    for source in sources:
        output = FOLDER / f"{source.stem}.cu.o"
        objects.append(str(output))
        flags = shlex.join([*cuda_flags(cuda, compiler), *families, *gencode(source.stem)])
        lines += [f"build {output}: nvcc {source.relative_to(ROOT)}", f"  flags = {flags}"]
    host = [*HOST_FLAGS, "-DMOE_CUDA=1", '-DMOE_CUDA_ARCHS="simulated"', *families, "-isystem", str(cuda.include)]
    for source in [*sorted((ROOT / "csrc/kernels/cuda").glob("*.cpp")), ROOT / "tests/gpusim/kernel_table.cpp"]:
        output = FOLDER / f"host_{source.stem}.o"
        objects.append(str(output))
        lines += [f"build {output}: cxx {source.relative_to(ROOT)}", f"  flags = {shlex.join(host)}"]
    lines += [
        f"build {FOLDER}/libmoe_cuda_sim.so: link {' '.join(objects)} | {FOLDER}/libgpusim.so",
        f"  flags = -Wl,-soname,libmoe_cuda_sim.so -Wl,-z,defs -L{FOLDER} -lgpusim -Wl,-rpath,'$$ORIGIN'",
    ]


def build(kernels: bool = True) -> Libraries:
    """Makes what is out of date. Raises BuildError with the compiler's words."""
    compiler, ninja = toolchain.find_compiler(os.environ), toolchain.find_ninja(os.environ)
    nvcc = toolchain.find_nvcc(os.environ) if kernels else None
    lines = [RULES.format(folder=FOLDER, cxx=shlex.join(compiler.command), nvcc=nvcc or "nvcc")]
    simulator_lines(lines)
    if nvcc:
        kernel_lines(lines, toolchain.find_cuda(os.environ), compiler)
    file = ROOT / FOLDER / "build.ninja"
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [ninja, "-C", str(ROOT), "-f", str(FOLDER / "build.ninja"), f"-j{read_jobs(os.environ)}"]
    with open(file.parent / "lock", "w") as lock:  # two test runs may come at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_if_changed(file, "\n".join(lines) + "\n")
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line[:400] for line in (done.stdout + done.stderr).splitlines()]
        raise toolchain.BuildError("The simulator could not be built:\n" + "\n".join(said[-40:]))
    return Libraries(ROOT / FOLDER / "libgpusim.so", ROOT / FOLDER / "libmoe_cuda_sim.so" if nvcc else None)


def compile_test(source: Path, output: Path, architecture: str = "90a", flags: tuple[str, ...] = ()) -> Path:
    """One .cu file of a test as a shared library over the simulator."""
    libraries = build(kernels=False)
    cuda, compiler = toolchain.find_cuda(os.environ), toolchain.find_compiler(os.environ)
    target = f"arch=compute_{architecture},code=compute_{architecture}"
    object_file = output.with_suffix(".o")
    command = [
        str(cuda.nvcc),
        *PTX_FLAGS,
        "-ccbin",
        compiler.program,
        "-gencode",
        target,
        *flags,
        "-c",
        str(source),
        "-o",
        str(object_file),
    ]
    link = [*compiler.command, "-shared", str(object_file), "-o", str(output), f"-L{libraries.simulator.parent}", "-lgpusim"]
    link += [f"-Wl,-rpath,{libraries.simulator.parent}", "-Wl,-z,defs"]
    for step in (command, link):
        done = subprocess.run(step, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise toolchain.BuildError(f"{source.name}: {done.stdout[-4000:]}{done.stderr[-4000:]}")
    return output


if __name__ == "__main__":
    try:
        print(build())
    except toolchain.BuildError as error:
        sys.exit(str(error))

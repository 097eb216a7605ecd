"""The plan of a build: what was found, what will be built for which processors, and why something will not be.

It is printed before anything is compiled, and it is what the libraries later tell about themselves (build_info).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import toolchain
from .toolchain import BuildError, Compiler, Cuda, Cutlass, Torch

DEFAULT_ARCHS = "8.0+PTX;9.0a"
X86_ISAS = ("avx512bf16", "avx512", "avx2", "generic")  # best first: the order in which the library tries them
GIB_PER_NVCC = 6  # peak memory of one translation unit of CUTLASS kernels


@dataclass(frozen=True)
class Arch:
    """One entry of TORCH_CUDA_ARCH_LIST: 8.0, 9.0a, 8.0+PTX."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def number(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    def gencode(self) -> list[str]:
        flags = ["-gencode", f"arch=compute_{self.number},code=sm_{self.number}"]
        return [*flags, "-gencode", f"arch=compute_{self.number},code=compute_{self.number}"] if self.ptx else flags

    def __str__(self) -> str:
        return f"sm_{self.number}" + ("+ptx" if self.ptx else "")


def parse_archs(text: str) -> tuple[list[Arch], list[Arch]]:
    """(to build, left out). The kernels need 8.0: bfloat16 tensor cores and asynchronous copies."""
    archs: list[Arch] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if found is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not understood: write compute capabilities, for example '{DEFAULT_ARCHS}'."
            )
        arch = Arch(int(found[1]), int(found[2]), found[3], bool(found[4]))
        if arch not in archs:
            archs.append(arch)
    kept = [a for a in archs if a.major >= 8]
    if not kept:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={text} leaves nothing to build: the kernels need 8.0 or newer (or build with MOE_EXT_CUDA=0)."
        )
    return kept, [a for a in archs if a.major < 8]


@dataclass
class Plan:
    root: Path
    version: str
    torch: Torch
    compiler: Compiler
    isas: list[str]
    ninja: str
    jobs: int
    cuda: Cuda | None = None
    archs: list[Arch] = field(default_factory=list)
    archs_left_out: list[Arch] = field(default_factory=list)
    cutlass: Cutlass | None = None
    nvcc_jobs: int = 1
    no_cuda: str = ""  # why there is no CUDA library

    def build_info(self) -> str:
        """What the libraries say about themselves. No date and no path: the same sources give the same bytes."""
        return json.dumps(
            {
                "version": self.version,
                "compiler": f"{self.compiler.family} {self.compiler.version}",
                "torch_headers": self.torch.version,
                "torch_target": toolchain.TORCH_TARGET,
                "isas": self.isas,
                "cuda": self.cuda.version if self.cuda else None,
                "cuda_archs": [str(a) for a in self.archs],
                "cutlass": self.cutlass.version if self.cutlass else None,
            }
        )

    def __str__(self) -> str:
        if self.cuda:
            cuda = f"{', '.join(str(a) for a in self.archs)}, with nvcc {self.cuda.version} ({self.cuda.nvcc})"
            if self.archs_left_out:
                cuda += f"; left out, older than 8.0: {', '.join(str(a) for a in self.archs_left_out)}"
        else:
            cuda = f"not built: {self.no_cuda}"
        rows = {
            "compiler": f"{self.compiler.family} {self.compiler.version} ({shlex.join(self.compiler.command)})",
            "torch": f"{self.torch.version} ({self.torch.root}); the result runs in torch >= {'.'.join(map(str, toolchain.MINIMUM_TORCH))}",
            "CPU kernels": ", ".join(self.isas),
            "CUDA kernels": cuda,
        }
        if self.cutlass:
            rows["CUTLASS"] = f"{self.cutlass.version} ({self.cutlass.include})"
        rows["jobs"] = f"{self.jobs}" + (f", at most {self.nvcc_jobs} of them nvcc ({GIB_PER_NVCC} GiB each)" if self.cuda else "")
        return "\n".join([f"moe_ext {self.version}: build plan", *(f"  {name:<13} {text}" for name, text in rows.items())])


def memory_gib() -> float:
    """Memory this process may use: the machine's, or its container's limit when that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            total = min(total, int(limit))
    return total / 2**30


def read_jobs(environ: Mapping[str, str]) -> int:
    wanted = environ.get("MAX_JOBS", "")
    if wanted and not (wanted.isdigit() and int(wanted) > 0):
        raise BuildError(f"MAX_JOBS={wanted} is not understood: set it to a number of parallel compilations, or leave it unset.")
    return int(wanted) if wanted else len(os.sched_getaffinity(0))


def make_plan(root: Path, version: str, environ: Mapping[str, str]) -> Plan:
    torch = toolchain.find_torch(environ)
    compiler = toolchain.find_compiler(environ)
    isas = list(X86_ISAS) if compiler.machine == "x86_64" else ["generic"]
    plan = Plan(root, version, torch, compiler, isas, toolchain.find_ninja(environ), read_jobs(environ))
    if toolchain.wants_cuda(environ):
        plan.cuda = toolchain.find_cuda(environ)
        plan.archs, plan.archs_left_out = parse_archs(environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
        unknown = [a for a in plan.archs if a.major * 10 + a.minor not in plan.cuda.archs]
        if unknown:
            raise BuildError(
                f"nvcc {plan.cuda.version} cannot compile for {', '.join(map(str, unknown))}: "
                "change TORCH_CUDA_ARCH_LIST or install a newer toolkit."
            )
        if uses_cutlass(root):
            plan.cutlass = toolchain.find_cutlass(environ, root)
        plan.nvcc_jobs = max(1, min(plan.jobs, int(memory_gib() / GIB_PER_NVCC)))
    else:
        plan.no_cuda = "MOE_EXT_CUDA=0" if environ.get("MOE_EXT_CUDA") == "0" else "no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
    return plan


def uses_cutlass(root: Path) -> bool:
    sources = [p for pattern in ("*.cu", "*.cuh", "*.h") for p in (root / "csrc/kernels/cuda").glob(pattern)]
    return any(re.search(r'#include\s*[<"](cutlass|cute)/', p.read_text()) for p in sources)

"""Finds what the build needs: torch's headers, a C++ compiler, ninja, pybind11, and for CUDA nvcc and CUTLASS.

Nothing is imported, torch least of all: a package is located and its version read from its files. Whatever is missing
becomes a BuildError, one sentence that ends with the command that mends it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000ULL"  # the oldest torch the libraries run in, as the stable ABI encodes it
MINIMUM_COMPILER = {"gcc": 11, "clang": 14}  # C++20 and the avx512bf16 instructions
CUDA_ROOTS = ("/usr/local/cuda",)


class BuildError(Exception):
    """The build cannot go on; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    family: str  # "gcc" or "clang"
    version: str
    machine: str  # "x86_64", "aarch64", ...

    @property
    def program(self) -> str:
        """The compiler itself, for nvcc, which takes no launcher."""
        return next(c for c in self.command if Path(c).name not in ("ccache", "sccache", "distcc"))


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    version: str
    include: Path
    lib: Path
    archs: frozenset[int]  # compute capabilities nvcc knows, as 80, 90, 100


@dataclass(frozen=True)
class Cutlass:
    include: Path
    version: str


def find_package(name: str) -> Path | None:
    """Folder of an importable package, without importing it.

    pip's isolated builds hide the environment they install into. They do it through PYTHONPATH, in the same
    interpreter, so that interpreter started without it sees the environment again.
    """
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s and s.origin else '')"
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}
    environ = {k: v for k, v in os.environ.items() if k not in hidden}
    found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd="/")
    origin = found.stdout.strip()
    return Path(origin).parent if origin else None


def read_match(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text()) if path.is_file() else None
    return found.group(1) if found else ""


def find_torch(environ: Mapping[str, str]) -> Torch:
    wanted = environ.get("MOE_EXT_TORCH")
    if wanted:
        roots = [Path(wanted), Path(wanted) / "torch"]
        root = next((r for r in roots if (r / "version.py").is_file()), None)
        if root is None:
            raise BuildError(f"MOE_EXT_TORCH={wanted} is not a torch package folder: set it to the folder that holds torch/version.py.")
    else:
        root = find_package("torch")
        if root is None:
            raise BuildError(
                f"No torch found for {sys.executable}: install one (pip install 'torch>=2.10') and run the command again, "
                "with --no-build-isolation if your installer builds in an environment of its own, "
                "or set MOE_EXT_TORCH to a torch package folder."
            )
    version = read_match(root / "version.py", r"__version__ = '([^']+)'")
    release = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if release < MINIMUM_TORCH:
        raise BuildError(
            f"torch {version or '(unknown)'} at {root} is too old: moe_ext needs 2.10 or newer (pip install -U 'torch>=2.10')."
        )
    for part in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "lib/libtorch.so"):
        if not (root / part).exists():
            raise BuildError(
                f"torch {version} at {root} lacks {part}: reinstall it (pip install --force-reinstall torch=={version.split('+')[0]})."
            )
    return Torch(root.resolve(), version)


def find_compiler(environ: Mapping[str, str]) -> Compiler:
    mend = "install one (apt install g++, or dnf install gcc-c++) or set CXX"
    wanted = environ.get("CXX")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    path = environ.get("PATH", os.defpath)
    command = next((shlex.split(n) for n in names if shutil.which(shlex.split(n)[0], path=path)), None)
    if command is None:
        raise BuildError(f"No C++ compiler found ({'CXX=' + wanted if wanted else 'looked for ' + ', '.join(names)}): {mend}.")
    command = [str(shutil.which(command[0], path=path)), *command[1:]]
    asked = subprocess.run([*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    macros = dict(re.findall(r"^#define (\w+) (\S+)$", asked.stdout, flags=re.MULTILINE))
    family, prefix = ("clang", "__clang") if "__clang_major__" in macros else ("gcc", "__GNUC")
    names3 = ("_major__", "_minor__", "_patchlevel__") if family == "clang" else ("__", "_MINOR__", "_PATCHLEVEL__")
    version = ".".join(macros.get(prefix + n, "0") for n in names3)
    if asked.returncode or int(version.split(".")[0]) < MINIMUM_COMPILER[family]:
        oldest = " or ".join(f"{f} {v}" for f, v in MINIMUM_COMPILER.items())
        raise BuildError(f"{shlex.join(command)} is {family} {version}, but C++20 and the CPU kernels need {oldest} or newer: {mend}.")
    return Compiler(tuple(command), family, version, "x86_64" if "__x86_64__" in macros else os.uname().machine)


def find_ninja(environ: Mapping[str, str]) -> str:
    found = shutil.which("ninja", path=environ.get("PATH", os.defpath))
    if found is None and (package := find_package("ninja")) is not None:
        # The wheel's program lies beside the interpreter, which need not be on PATH.
        candidates = [Path(sys.executable).parent / "ninja", package / "data" / "bin" / "ninja"]
        found = next((str(c) for c in candidates if os.access(c, os.X_OK)), None)
    if found is None:
        raise BuildError("No ninja found: install it (pip install ninja).")
    return found


def find_python_include() -> Path:
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        raise BuildError(
            f"Python.h is missing from {include}: install Python's headers (apt install python3-dev, or dnf install python3-devel)."
        )
    return include


def find_pybind11(torch: Torch) -> Path:
    """torch ships pybind11's headers; the wheel serves a torch that does not."""
    if (torch.root / "include/pybind11/pybind11.h").is_file():
        return torch.root / "include"
    package = find_package("pybind11")
    if package is None or not (package / "include/pybind11/pybind11.h").is_file():
        raise BuildError("No pybind11 headers found, neither in torch nor as a package: install them (pip install pybind11).")
    return package / "include"


def wants_cuda(environ: Mapping[str, str]) -> bool:
    """MOE_EXT_CUDA=0|1 decides; without it, the presence of nvcc."""
    forced = environ.get("MOE_EXT_CUDA", "")
    if forced not in ("", "0", "1"):
        raise BuildError(
            f"MOE_EXT_CUDA={forced} is not understood: set it to 0 (CPU only), 1 (CUDA too) or leave it unset (CUDA when nvcc is there)."
        )
    return forced == "1" or (forced == "" and find_nvcc(environ) is not None)


def find_nvcc(environ: Mapping[str, str], roots: tuple[str, ...] = CUDA_ROOTS) -> Path | None:
    if wanted := environ.get("CUDACXX"):
        found = shutil.which(wanted, path=environ.get("PATH", os.defpath))
        if found is None:
            raise BuildError(f"CUDACXX={wanted} is no program that can be run: set it to nvcc's path, or unset it.")
        return Path(found)
    if (home := environ.get("CUDA_HOME")) and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
        return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        return Path(found)
    return next((Path(r) / "bin" / "nvcc" for r in roots if os.access(Path(r) / "bin" / "nvcc", os.X_OK)), None)


def find_cuda(environ: Mapping[str, str], roots: tuple[str, ...] = CUDA_ROOTS) -> Cuda:
    nvcc = find_nvcc(environ, roots)
    if nvcc is None:
        raise BuildError(
            "MOE_EXT_CUDA=1, but no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda: "
            "install the CUDA toolkit or set CUDACXX to its nvcc."
        )
    # The nvcc on PATH may be a wrapper script, so the toolkit is where nvcc itself says it is.
    dry = subprocess.run([str(nvcc), "--dryrun", "probe.cu"], capture_output=True, text=True, cwd="/").stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, flags=re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parent.parent
    version = read_nvcc_version(nvcc)
    without = f"reinstall the CUDA {version} toolkit, or build without CUDA (MOE_EXT_CUDA=0)"
    include = next((p.parent for pattern in ("include", "targets/*/include") for p in root.glob(f"{pattern}/cuda_runtime.h")), None)
    if include is None:
        raise BuildError(f"The CUDA toolkit at {root} has no cuda_runtime.h: {without}.")
    folders = ("lib64", "lib", "targets/*/lib")
    lib = next((p.parent for pattern in folders for p in root.glob(f"{pattern}/libcudart_static.a")), None)
    if lib is None:
        raise BuildError(f"The CUDA toolkit at {root} has no libcudart_static.a: {without}.")
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = frozenset(int(n) for n in re.findall(r"compute_(\d+)", listed))
    return Cuda(nvcc, version, include, lib, archs)


def read_nvcc_version(nvcc: Path) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    if found is None:
        raise BuildError(
            f"{nvcc} --version answers nothing that names a version: reinstall the CUDA toolkit or set CUDACXX to another nvcc."
        )
    return found.group(1)


def find_cutlass(environ: Mapping[str, str], root: Path) -> Cutlass:
    places = [Path(environ["CUTLASS_PATH"])] if environ.get("CUTLASS_PATH") else [root / "third_party" / "cutlass"]
    if not environ.get("CUTLASS_PATH") and (package := find_package("cutlass_library")) is not None:
        places.append(package / "source")
    for place in places:
        for include in (place / "include", place):
            header = include / "cutlass" / "version.h"
            if header.is_file():
                numbers = [read_match(header, rf"#define CUTLASS_{part} (\d+)") for part in ("MAJOR", "MINOR", "PATCH")]
                return Cutlass(include.resolve(), ".".join(numbers))
    looked = (
        f"CUTLASS_PATH={environ['CUTLASS_PATH']}" if environ.get("CUTLASS_PATH") else "third_party/cutlass and the nvidia-cutlass package"
    )
    raise BuildError(
        f"CUTLASS was not found in {looked}: install its headers (pip install --no-deps nvidia-cutlass==4.2.0.0), "
        "or set CUTLASS_PATH to a checkout, or build without CUDA (MOE_EXT_CUDA=0)."
    )

"""Sets up one virtual environment for the Makefile:
`python -m build_tools.environment FOLDER -r FILE... [--torch] [--build [--cuda] | --source-path]`.

Each step leaves a stamp with a digest of what it depends on, so a second call is quick. A torch that this Python already has is
used as it is. Otherwise one is installed, but never a CUDA build, with its gigabytes, on a machine without an NVIDIA driver. Nor are the
CUDA kernels compiled there, which takes minutes, unless MOE_EXT_CUDA=1 or --cuda asks for it: tests read the library without running it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from .toolchain import BuildError, wants_cuda

ROOT = Path(__file__).resolve().parent.parent
CUTLASS = ("nvidia-cutlass", "4.2.0.0")
TORCH = "2.13.0"  # what is installed where there is none; the libraries run in any torch >= 2.10
IMPORT_TORCH = "import torch; v = torch.__version__; assert tuple(map(int, v.split('.')[:2])) >= (2, 10), v; print(v)"
READ_TORCH = "from importlib.metadata import version; print(version('torch'))"
SOURCES = {".cpp", ".h", ".cu", ".cuh", ".py"}
SETTINGS = "MOE_EXT_TORCH TORCH_CUDA_ARCH_LIST CXX CXXFLAGS LDFLAGS CUDACXX CUDA_HOME CUTLASS_PATH".split()


class Stop(Exception):
    """The environment cannot be set up; the message is one sentence with the way out."""


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def has_nvidia_driver() -> bool:
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program, "-L"], capture_output=True).returncode == 0


def leaves_cuda_out(environ: Mapping[str, str], wherever_nvcc_is: bool) -> bool:
    """Whether CUDA is not compiled although nvcc is found: nobody asked for it, and nothing here could run it."""
    asked = wherever_nvcc_is or environ.get("MOE_EXT_CUDA")
    return not asked and wants_cuda(environ) and not has_nvidia_driver()


def torch_of(python: Path | str, probe: str = READ_TORCH) -> str:
    """Version of an interpreter's torch, or ''. Reading it is quick; importing it proves that it works and is new enough."""
    found = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, cwd="/")
    return found.stdout.strip() if found.returncode == 0 else ""


class Environment:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.python = self.folder / "bin" / "python"

    def run(self, *arguments: str, environ: Mapping[str, str] = os.environ) -> None:
        if subprocess.run([str(self.python), *arguments], cwd=ROOT, env=environ).returncode:
            raise Stop(f"{self.python} {' '.join(arguments)} failed; the reason is above.")

    def pip(self, *arguments: str, environ: Mapping[str, str] = os.environ) -> None:
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, environ=environ)

    def is_done(self, step: str, digest: str) -> bool:
        stamp = self.folder / f".{step}.stamp"
        return stamp.is_file() and stamp.read_text() == digest

    def mark_done(self, step: str, digest: str) -> None:
        (self.folder / f".{step}.stamp").write_text(digest)

    def create(self, with_torch: bool) -> None:
        digest = f"{sys.version} {with_torch}"
        if self.is_done("create", digest) and self.python.exists():
            return
        present = torch_of(sys.executable, IMPORT_TORCH) if with_torch else ""
        in_venv = sys.prefix != sys.base_prefix
        say(f"creating {self.folder}" + (f", with torch {present} of {sys.executable}" if present else ""))
        share = ["--system-site-packages"] if present and not in_venv else []
        if subprocess.run([sys.executable, "-m", "venv", "--clear", *share, str(self.folder)]).returncode:
            raise Stop(f"{sys.executable} cannot create a virtual environment: install its venv module (apt install python3-venv).")
        if present and in_venv:
            # A venv made from a venv sees the base interpreter's packages, not those of the venv, which has the torch.
            self.add_path("shared_torch", sysconfig.get_paths()["purelib"])
        if with_torch and not present:
            self.install_torch()
        self.mark_done("create", digest)

    def add_path(self, name: str, folder: str) -> None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (self.folder / "lib" / version / "site-packages" / f"{name}.pth").write_text(folder + "\n")

    def install_torch(self) -> None:
        if has_nvidia_driver():
            say(f"installing torch {TORCH}")
            self.pip(f"torch=={TORCH}")
            return
        say(f"installing torch {TORCH}, the CPU build: this machine has no NVIDIA driver")
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"torch=={TORCH}+cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise Stop(
                "This machine has no NVIDIA driver, and the package index of this pip has no CPU build of torch: install the CPU build "
                f"for {sys.executable} as pytorch.org/get-started says for 'CPU', then run the same command again; it will be used."
            )

    def install(self, requirements: list[Path], with_torch: bool) -> None:
        version = torch_of(self.python) if with_torch else ""
        digest = digest_of([*requirements, *(f.parent / "build.txt" for f in requirements)]) + version
        if self.is_done("install", digest):
            return
        say(f"installing {', '.join(str(f.relative_to(ROOT)) for f in requirements)}")
        pinned = self.folder / "torch.constraint"  # no package may replace the torch that was chosen above
        pinned.write_text(f"torch=={version}\n" if version else "")
        self.pip("-c", str(pinned), *(part for f in requirements for part in ("-r", str(f))))
        self.mark_done("install", digest)

    def install_cutlass(self) -> None:
        """Its headers, and nothing else of the package (third_party/README.md): its own requirements serve its Python part."""
        if os.environ.get("CUTLASS_PATH") or (ROOT / "third_party" / "cutlass").is_dir():
            return
        looked = subprocess.run(
            [str(self.python), "-c", f"from importlib.metadata import version; print(version('{CUTLASS[0]}'))"],
            capture_output=True,
            text=True,
            cwd="/",
        )
        if looked.stdout.strip() != CUTLASS[1]:
            say(f"installing the headers of CUTLASS {CUTLASS[1]}")
            self.pip("--no-deps", "==".join(CUTLASS))

    def build(self, wherever_nvcc_is: bool) -> None:
        """Builds in place and installs the source folder itself, so that edits of Python files need no further step."""
        left_out = leaves_cuda_out(os.environ, wherever_nvcc_is)
        cuda = wants_cuda(os.environ) and not left_out
        if self.is_built(cuda) or (left_out and self.is_built(cuda=True)):  # a build with CUDA serves those who do not ask for it
            return
        if left_out:
            say("CUDA is not compiled: nvcc is here, but no NVIDIA driver (MOE_EXT_CUDA=1 compiles it)")
        if cuda:
            self.install_cutlass()
        environ = {**os.environ, "MOE_EXT_CUDA": "0"} if left_out else os.environ
        self.run("setup.py", "--quiet", "build_ext", "--inplace", environ=environ)  # by itself: pip would hide the plan and the progress
        self.pip("--no-build-isolation", "--no-deps", "-e", str(ROOT), environ=environ)
        self.mark_done("build", self.build_digest(cuda))

    def is_built(self, cuda: bool) -> bool:
        libraries = ["libmoe_cpu.so", *(["libmoe_cuda.so"] if cuda else [])]
        return self.is_done("build", self.build_digest(cuda)) and all((ROOT / "moe_ext" / name).exists() for name in libraries)

    def build_digest(self, cuda: bool) -> str:
        """Of what the libraries are made from and how."""
        native = sorted(p for folder in ("csrc", "build_tools") for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES)
        settings = " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k in SETTINGS)
        files = digest_of([ROOT / "setup.py", ROOT / "pyproject.toml", *native])
        return f"{files} cuda={cuda} {settings} {torch_of(self.python)}"


def digest_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up a virtual environment for the Makefile.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-r", dest="requirements", type=Path, action="append", default=[], help="requirements file")
    parser.add_argument("--torch", action="store_true", help="with torch")
    parser.add_argument("--build", action="store_true", help="build the libraries and install the source folder (editable)")
    parser.add_argument("--cuda", action="store_true", help="build for CUDA wherever nvcc is, also without an NVIDIA driver")
    parser.add_argument("--source-path", action="store_true", help="put the source folder on the path; the libraries are built already")
    chosen = parser.parse_args()
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 - this runs before anything has checked
            raise Stop(
                f"{sys.executable} is Python {sys.version.split()[0]}, but moe_ext needs 3.10 or newer: make PYTHON=/path/to/python3 ..."
            )
        environment = Environment(chosen.folder)
        environment.create(chosen.torch)
        environment.install([ROOT / f for f in chosen.requirements], chosen.torch)
        if chosen.source_path:
            environment.add_path("moe_ext_source", str(ROOT))
        if chosen.build:
            environment.build(chosen.cuda)
    except (Stop, BuildError) as stop:
        print(f"\nmoe_ext: {stop}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

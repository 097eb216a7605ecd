"""Builds the native parts of moe_ext with ninja; build_tools/ has the how, pyproject.toml everything else.

Environment: MOE_EXT_CUDA=0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDA_HOME, CUTLASS_PATH,
MOE_EXT_TORCH (a torch package folder). torch is located, never imported: the libraries use its headers and nothing else.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not have the source folder on its path

from build_tools.ninja_file import build  # noqa: E402
from build_tools.plan import make_plan  # noqa: E402
from build_tools.products import Product  # noqa: E402
from build_tools.toolchain import BuildError, find_torch, wants_cuda  # noqa: E402


class NinjaBuild(build_ext):
    """setuptools decides where libraries go (a wheel, or the source folder when editable); ninja makes them."""

    products: dict[str, Product]

    def run(self) -> None:
        plan = make_plan(ROOT, self.distribution.get_version(), os.environ)
        print(plan, flush=True)
        products = build(plan, os.environ, verbose=self.verbose > 1)
        self.products = {f"moe_ext.{p.name}": p for p in products}
        super().run()
        if plan.cuda is None:
            self.remove_stale_cuda_library()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(ROOT / self.products[ext.name].output), str(target))

    def remove_stale_cuda_library(self) -> None:
        """One left by an earlier build would be loaded although its ops no longer match."""
        stale = (ROOT if self.inplace else Path(self.build_lib)) / "moe_ext" / "libmoe_cuda.so"
        if stale.exists():
            print(f"removing {stale}: it is from an earlier build, and this one is without CUDA")
            stale.unlink()

    def get_ext_filename(self, fullname: str) -> str:
        # The op libraries have no Python linkage: the same file serves every Python, so its name carries no version.
        if fullname.split(".")[-1].startswith("libmoe_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


class EarlyTorchCheck(dist_info):
    """pip asks for the metadata first, then downloads torch with its gigabytes, and only then builds: too late to say it is missing."""

    def run(self) -> None:
        find_torch(os.environ)
        super().run()


try:
    names = ["libmoe_cpu", "_C", *(["libmoe_cuda"] if wants_cuda(os.environ) else [])]
    commands = {"build_ext": NinjaBuild, "dist_info": EarlyTorchCheck}
    setup(ext_modules=[Extension(f"moe_ext.{name}", sources=[]) for name in names], cmdclass=commands)
except BuildError as error:
    raise SystemExit(f"\nmoe_ext: {error}\n") from None

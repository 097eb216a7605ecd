"""The three products of a build, as translation units with their flags. Pure data; ninja_file.py writes it down.

libmoe_cpu.so   kernels/cpu once per instruction set, ops, all schemas, CPU implementations
libmoe_cuda.so  kernels/cuda once per architecture, ops again (compiled for it), CUDA implementations
_C              the pybind11 module; the only product that is tied to a Python version
"""

from __future__ import annotations

import shlex
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import toolchain
from .plan import Arch, Plan

BUILD_FOLDER = Path("build") / "ninja"  # relative to the repository, as every path of ours that ninja sees

BASE_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc")
KERNEL_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
NVCC_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Icsrc", "-Xptxas", "-v")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS: dict[str, tuple[str, ...]] = {"avx512bf16": (*AVX512, "-mavx512bf16"), "avx512": AVX512, "avx2": AVX2, "generic": ()}

# After CXXFLAGS: inline functions that stay functions (-O0), and the marks of an LTO object (-flto, the default of some distributions), are
# symbols that the linker could share between instruction sets; see checks.check_kernel_object.
ISA_LAST = ("-O3", "-fno-lto")


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    source: Path
    output: Path
    flags: tuple[str, ...]
    rule: str = "cxx"  # or "nvcc"
    isa: str = ""  # of a CPU kernel


@dataclass(frozen=True)
class Product:
    name: str  # within moe_ext, as setuptools names the extension
    output: Path
    units: tuple[Unit, ...]
    link: tuple[str, ...]


def gencode_flags(archs: list[Arch], stem: str) -> list[str]:
    """Targets of one .cu file. *_sm90 uses wgmma, which only 9.0a has; *_sm100 is untested, so 10.0a must be named for it.
    Empty: left out."""
    if stem.endswith("_sm90"):
        return Arch(9, 0, "a").gencode() if any(a.major == 9 for a in archs) else []
    if stem.endswith("_sm100"):
        return Arch(10, 0, "a").gencode() if any(a.number == "100a" for a in archs) else []
    return [flag for a in archs for flag in a.gencode()]


class Products:
    """Derives the products from a plan and from the files that are in csrc."""

    def __init__(self, plan: Plan, environ: Mapping[str, str]) -> None:
        self.plan = plan
        self.cxxflags = shlex.split(environ.get("CXXFLAGS", ""))
        self.ldflags = tuple(shlex.split(environ.get("LDFLAGS", "")))
        # Error messages carry __FILE__; it must not carry the folders of the machine that built.
        self.path_maps = (f"-ffile-prefix-map={plan.torch.root}=torch", f"-ffile-prefix-map={plan.root}/=")
        self.torch_flags = (
            f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}",
            f"-I{BUILD_FOLDER}/include",
            "-isystem",
            f"{plan.torch.root}/include",
        )
        self.torch_libs = f"-L{plan.torch.root}/lib"

    def all(self) -> list[Product]:
        cuda = [self.cuda_library()] if self.plan.cuda else []
        return [self.cpu_library(), *cuda, self.python_module()]

    def sources(self, pattern: str) -> list[Path]:
        return sorted(p.relative_to(self.plan.root) for p in (self.plan.root / "csrc").glob(pattern))

    def cxx(self, source: Path, folder: str, *flags: str) -> Unit:
        return Unit(source, BUILD_FOLDER / folder / f"{source.stem}.o", (*BASE_FLAGS, *self.path_maps, *flags, *self.cxxflags))

    def cpu_library(self) -> Product:
        units = []
        for source in self.sources("kernels/cpu/*.cpp"):
            if source.stem == "table":
                units.append(self.cxx(source, "cpu/kernels", "-DMOE_ISAS(F)=" + " ".join(f"F({isa})" for isa in self.plan.isas)))
            else:
                units += [self.cpu_kernel(source, isa) for isa in self.plan.isas]
        registration = self.sources("registration/schemas.cpp") + self.sources("registration/impls_cpu.cpp")
        units += [self.cxx(s, f"cpu/{s.parent.name}", *self.torch_flags) for s in self.sources("ops/*.cpp") + registration]
        link = ("-Wl,-soname,libmoe_cpu.so", "-Wl,-z,defs", self.torch_libs, "-ltorch_cpu", *self.ldflags)
        return Product("libmoe_cpu", BUILD_FOLDER / "libmoe_cpu.so", tuple(units), link)

    def cpu_kernel(self, source: Path, isa: str) -> Unit:
        # g++ 12 warns wrongly about its own avx512fintrin.h.
        quiet = ("-Wno-uninitialized", "-Wno-maybe-uninitialized") if "512" in isa and self.plan.compiler.family == "gcc" else ()
        unit = self.cxx(source, f"cpu/kernels/{isa}", f"-DMOE_ISA={isa}", *KERNEL_FLAGS, *ISA_FLAGS[isa], *quiet)
        return replace(unit, isa=isa, flags=unit.flags if isa == "generic" else (*unit.flags, *ISA_LAST))

    def cuda_library(self) -> Product:
        cuda = self.plan.cuda
        assert cuda is not None
        kernels = [(s, flags) for s in self.sources("kernels/cuda/*.cu") if (flags := gencode_flags(self.plan.archs, s.stem))]
        # The kernel table names only kernels that are in the library: this tells it whether those of 9.0 are.
        families = ["-DMOE_CUDA_SM90=1"] if any(s.stem.endswith("_sm90") for s, _ in kernels) else []
        units = [self.cuda_kernel(s, [*families, *flags]) for s, flags in kernels]
        archs = ", ".join(map(str, self.plan.archs))
        host_flags = ("-DMOE_CUDA=1", f'-DMOE_CUDA_ARCHS="{archs}"', *families, "-isystem", str(cuda.include), *self.torch_flags)
        host = self.sources("ops/*.cpp") + self.sources("kernels/cuda/*.cpp") + self.sources("registration/impls_cuda.cpp")
        units += [self.cxx(s, f"cuda/{s.parent.name}", *host_flags) for s in host]
        link = (
            *("-Wl,-soname,libmoe_cuda.so", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL", self.torch_libs),
            # Nothing is taken from libtorch.so itself: it is what brings libtorch_cuda.so into the scope in which the
            # weak CUDA shims are looked up. --as-needed, the default of many compilers, would drop it.
            *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"),
            *(f"-L{cuda.lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", *self.ldflags),
        )
        return Product("libmoe_cuda", BUILD_FOLDER / "libmoe_cuda.so", tuple(units), link)

    def cuda_kernel(self, source: Path, flags: list[str]) -> Unit:
        host = ",".join(("-fPIC", "-fvisibility=hidden", "-Wall", *self.path_maps))
        # 2908: a C++20 deprecation all over CUTLASS' headers.
        cutlass = ("-diag-suppress", "2908", "-isystem", str(self.plan.cutlass.include)) if self.plan.cutlass else ()
        common = (*NVCC_FLAGS, "-ccbin", self.plan.compiler.program, "-Xcompiler", host, *cutlass)
        return Unit(source, BUILD_FOLDER / "cuda/kernels" / f"{source.stem}.cu.o", (*common, *flags), "nvcc")

    def python_module(self) -> Product:
        suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
        python = toolchain.find_python_include()
        includes = [f"-I{BUILD_FOLDER}/include", "-isystem", str(toolchain.find_pybind11(self.plan.torch)), "-isystem", str(python)]
        includes.append(f"-ffile-prefix-map={python}=python")
        module = self.cxx(Path("csrc/registration/module.cpp"), f"python{suffix.removesuffix('.so')}", *includes)
        return Product("_C", BUILD_FOLDER / f"_C{suffix}", (module,), self.ldflags)

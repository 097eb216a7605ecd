"""The build's own promises: what the libraries need and carry, and that every way of failing is one sentence with a way out.

The libraries are looked at as files; only the last tests load one, each in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import checks, plan, products, toolchain
from build_tools.toolchain import BuildError

ROOT = Path(__file__).resolve().parents[2]

# Located, not imported: the copy that the other tests use.
_spec = importlib.util.find_spec("moe_ext")
assert _spec is not None and _spec.origin is not None
PACKAGE = Path(_spec.origin).parent

CPU = PACKAGE / "libmoe_cpu.so"
CUDA = PACKAGE / "libmoe_cuda.so"
needs_cuda_library = pytest.mark.skipif(not CUDA.exists(), reason="libmoe_cuda.so was not built: no nvcc, or MOE_EXT_CUDA=0")
OP_LIBRARIES = [pytest.param(CPU, id="cpu"), pytest.param(CUDA, id="cuda", marks=needs_cuda_library)]

# What the oldest supported distributions have (glibc 2.34: RHEL 9; libstdc++ of g++ 11). A rise means a new, needless demand.
CEILINGS = {CPU: {"GLIBC": (2, 32), "GLIBCXX": (3, 4, 29)}, CUDA: {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29)}}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environ)


# ---- the libraries as files


@pytest.mark.parametrize("library", OP_LIBRARIES)
def test_op_library_passes_the_builds_own_checks(library: Path) -> None:
    assert checks.check_library(library) == []


@pytest.mark.parametrize("library", OP_LIBRARIES)
def test_op_library_needs_only_torch_and_the_system(library: Path) -> None:
    needed = checks.read_elf(library).needed
    assert "libtorch_cpu.so" in needed
    assert ("libtorch.so" in needed) == (library == CUDA)  # a C++ process may lack libtorch.so, so the CPU library must not need it
    system = re.compile(r"(libtorch(_cpu)?|libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux.*)\.so")
    assert [n for n in needed if not system.match(n)] == []


@pytest.mark.parametrize("library", OP_LIBRARIES)
def test_op_library_runs_on_older_systems(library: Path) -> None:
    elf = checks.read_elf(library)
    for family, ceiling in CEILINGS[library].items():
        assert elf.newest(family) <= ceiling, f"{library.name} asks for {family} {elf.newest(family)}"


@pytest.mark.parametrize("library", OP_LIBRARIES)
def test_op_library_exports_its_description_and_no_kernel(library: Path) -> None:
    exported = checks.read_elf(library).exported
    assert "moe_describe" in exported
    assert [s for s in exported if s.startswith(("_ZN3moe", "cuda"))] == []  # two copies of cudart in one process must not mix


@needs_cuda_library
def test_cuda_shim_is_weak() -> None:
    """A strong one would keep the library from loading in a torch without CUDA."""
    assert "aoti_torch_get_current_cuda_stream" in checks.read_elf(CUDA).weak_undefined


def test_no_folder_of_the_building_machine_is_in_a_library() -> None:
    import torch

    folders = {str(ROOT), str(PACKAGE), str(Path(torch.__file__).parent), sys.prefix, str(Path.home())} - {"/", "/usr"}
    for library in PACKAGE.glob("*.so"):
        data = library.read_bytes()
        assert [f for f in folders if f.encode() in data] == [], library.name


# ---- the checks themselves

ADVISORY = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions"
CLEAN = """\
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90a'
ptxas info    : Function properties for _Z3fooPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILLING = CLEAN.replace("0 bytes spill stores, 0 bytes spill loads", "40 bytes spill stores, 60 bytes spill loads")


def test_ptxas_advisory_is_found_in_any_file() -> None:
    log = f"{CLEAN}{ADVISORY} in the function 'a'\n{ADVISORY} in the function 'b'\n"
    (complaint,) = checks.check_ptxas(log, "csrc/kernels/cuda/sort.cu")
    assert "sort.cu" in complaint and "2 advisories" in complaint and "C7510" in complaint and complaint.endswith("'b'")


def test_a_symbol_that_looks_like_an_advisory_is_none() -> None:
    assert checks.check_ptxas(CLEAN.replace("_Z3fooPf", "_Z6C7510_Pf"), "csrc/kernels/cuda/grouped_mm_sm90.cu") == []


def test_spill_is_an_error_in_a_gemm_kernel_only() -> None:
    (complaint,) = checks.check_ptxas(SPILLING, "csrc/kernels/cuda/grouped_mm.cu")
    assert "100 bytes" in complaint and "_Z3fooPf" in complaint and "sm_90a" in complaint
    assert checks.check_ptxas(SPILLING, "csrc/kernels/cuda/sort.cu") == []
    assert checks.check_ptxas(CLEAN, "csrc/kernels/cuda/grouped_mm.cu") == []


def test_run_nvcc_leaves_no_object_behind_a_complaint(tmp_path: Path) -> None:
    """Otherwise the next build would find nothing to do and pass."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\necho '{ADVISORY}'\necho object > $1\n")
    compiler.chmod(0o755)
    target = tmp_path / "a.cu.o"
    command = [sys.executable, "-m", "build_tools.run_nvcc", "a.cu", str(target), "--", str(compiler), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "C7510" in done.stdout and not target.exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to make an example library with")
def test_library_checks_find_what_they_look_for(tmp_path: Path) -> None:
    def link(name: str, *flags: str) -> Path:
        subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", name, *flags], check=True, cwd=tmp_path)
        return tmp_path / name

    link("libpython3.99.so", "-Wl,-soname,libpython3.99.so")
    library = link("libmoe_cuda.so", "-Wl,--no-as-needed", "-L.", "-lpython3.99")
    python, torch = checks.check_library(library)
    assert "libpython" in python and "-ltorch" in torch


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to make an example object with")
def test_kernel_objects_share_nothing_between_instruction_sets(tmp_path: Path) -> None:
    def compile_kernel(isa: str, helper: str) -> Path:
        source = f"{helper} namespace moe::cpu::{isa} {{ inline int own() {{ return 1; }} auto f = &own; auto g = &helper; }}"
        output = tmp_path / f"{isa}.o"
        subprocess.run(["g++", "-c", "-x", "c++", "-", "-o", str(output)], input=source, text=True, check=True)
        return output

    shared, kept = "inline int helper() { return 2; }", "static int helper() { return 2; }"
    (complaint,) = checks.check_kernel_object(compile_kernel("avx2", shared), "avx2")
    assert "avx2.o of avx2 defines _Z6helperv" in complaint and "namespace moe::cpu::MOE_ISA" in complaint
    assert checks.check_kernel_object(compile_kernel("avx2", kept), "avx2") == []
    assert checks.check_kernel_object(compile_kernel("generic", shared), "generic") == []  # it runs everywhere


# ---- the plan


def test_arch_list() -> None:
    kept, left_out = plan.parse_archs("7.5 8.0;8.6+PTX, 9.0a")
    assert [str(a) for a in kept] == ["sm_80", "sm_86+ptx", "sm_90a"]
    assert [str(a) for a in left_out] == ["sm_75"]
    assert [str(a) for a in plan.parse_archs("10.0;12.0")[0]] == ["sm_100", "sm_120"]


@pytest.mark.parametrize("text", ["Hopper", "8", "9.0b", "8.0;;x"])
def test_arch_list_that_is_not_understood(text: str) -> None:
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST.*for example '8.0"):
        plan.parse_archs(text)


def test_arch_list_with_nothing_to_build() -> None:
    with pytest.raises(BuildError, match="7.0;7.5.*8.0 or newer"):
        plan.parse_archs("7.0;7.5")


def test_each_cuda_file_is_compiled_for_its_devices() -> None:
    archs, _ = plan.parse_archs("8.0+PTX;9.0a")
    a100 = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_80,code=compute_80"]
    hopper = ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert products.gencode_flags(archs, "grouped_mm_sm90") == hopper
    assert products.gencode_flags(archs, "permute") == a100 + hopper
    # wgmma exists for 9.0a only, also when the list says 9.0; without either there is nothing to compile
    assert products.gencode_flags(plan.parse_archs("9.0")[0], "grouped_mm_sm90") == hopper
    assert products.gencode_flags(plan.parse_archs("8.0")[0], "grouped_mm_sm90") == []
    for without in ("8.0+PTX;9.0a", "10.0", "10.0f", "12.0a"):
        assert products.gencode_flags(plan.parse_archs(without)[0], "grouped_mm_sm100") == []
    assert products.gencode_flags(plan.parse_archs("9.0a;10.0a")[0], "grouped_mm_sm100") == ["-gencode", "arch=compute_100a,code=sm_100a"]


def test_max_jobs() -> None:
    assert plan.read_jobs({"MAX_JOBS": "3"}) == 3
    assert plan.read_jobs({}) >= 1
    for wrong in ("0", "many", "-1"):
        with pytest.raises(BuildError, match=f"MAX_JOBS={wrong}"):
            plan.read_jobs({"MAX_JOBS": wrong})


# ---- what is missing is said in one sentence, with what mends it


def make_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_torch(root: Path, version: str) -> Path:
    for part in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "lib/libtorch.so"):
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    (root / "version.py").write_text(f"__version__ = '{version}'\n")
    return root


def test_no_compiler(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No C\\+\\+ compiler found.*apt install g\\+\\+"):
        toolchain.find_compiler({"PATH": str(tmp_path)})
    with pytest.raises(BuildError, match="CXX=nowhere.*apt install g\\+\\+"):
        toolchain.find_compiler({"PATH": str(tmp_path), "CXX": "nowhere"})


def test_old_compiler(tmp_path: Path) -> None:
    make_program(tmp_path / "g++", "echo '#define __GNUC__ 9'; echo '#define __GNUC_MINOR__ 4'; echo '#define __GNUC_PATCHLEVEL__ 0'")
    with pytest.raises(BuildError, match="gcc 9.4.0.*gcc 11 or clang 14 or newer"):
        toolchain.find_compiler({"PATH": str(tmp_path)})


def test_compiler_behind_a_launcher(tmp_path: Path) -> None:
    make_program(tmp_path / "ccache", "echo '#define __GNUC__ 12'; echo '#define __x86_64__ 1'")
    found = toolchain.find_compiler({"PATH": str(tmp_path), "CXX": "ccache g++"})
    assert found.command == (str(tmp_path / "ccache"), "g++")
    assert found.program == "g++" and found.machine == "x86_64" and found.version == "12.0.0"


def test_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_package", lambda name: None)
    with pytest.raises(BuildError, match="pip install ninja"):
        toolchain.find_ninja({"PATH": str(tmp_path)})


def test_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_package", lambda name: None)
    with pytest.raises(BuildError, match="No torch found.*pip install 'torch>=2.10'"):
        toolchain.find_torch({})
    with pytest.raises(BuildError, match="MOE_EXT_TORCH=.*torch/version.py"):
        toolchain.find_torch({"MOE_EXT_TORCH": str(tmp_path)})


def test_torch_named_by_the_environment(tmp_path: Path) -> None:
    root = make_torch(tmp_path / "torch", "2.11.0+cu130")
    for named in (root, tmp_path):  # the package, or the folder it is in
        assert toolchain.find_torch({"MOE_EXT_TORCH": str(named)}) == toolchain.Torch(root, "2.11.0+cu130")


def test_old_or_incomplete_torch(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="torch 2.9.1 .*too old.*pip install"):
        toolchain.find_torch({"MOE_EXT_TORCH": str(make_torch(tmp_path / "old", "2.9.1"))})
    root = make_torch(tmp_path / "new", "2.10.0")
    (root / "include/torch/csrc/stable/library.h").unlink()
    with pytest.raises(BuildError, match="lacks include/torch/csrc/stable/library.h.*--force-reinstall torch==2.10.0"):
        toolchain.find_torch({"MOE_EXT_TORCH": str(root)})


def test_no_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(BuildError, match="Python.h.*apt install python3-dev"):
        toolchain.find_python_include()


def test_cuda_follows_nvcc_unless_forced(tmp_path: Path) -> None:
    nvcc = make_program(tmp_path / "cuda/bin/nvcc", "exit 0")
    assert toolchain.find_nvcc({"PATH": ""}, roots=()) is None
    assert toolchain.find_nvcc({"PATH": ""}, roots=(str(tmp_path / "cuda"),)) == nvcc
    assert toolchain.find_nvcc({"PATH": str(nvcc.parent)}, roots=()) == nvcc
    assert toolchain.find_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path / "cuda")}, roots=()) == nvcc
    assert toolchain.find_nvcc({"PATH": "", "CUDACXX": str(nvcc)}, roots=()) == nvcc
    assert toolchain.wants_cuda({"PATH": str(nvcc.parent)})
    assert not toolchain.wants_cuda({"PATH": str(nvcc.parent), "MOE_EXT_CUDA": "0"})
    assert toolchain.wants_cuda({"PATH": "", "MOE_EXT_CUDA": "1"})
    with pytest.raises(BuildError, match="MOE_EXT_CUDA=yes.*set it to 0"):
        toolchain.wants_cuda({"MOE_EXT_CUDA": "yes"})


def test_cuda_forced_without_nvcc() -> None:
    with pytest.raises(BuildError, match="no nvcc in CUDACXX, CUDA_HOME, PATH.*install the CUDA toolkit"):
        toolchain.find_cuda({"PATH": "", "MOE_EXT_CUDA": "1"}, roots=())
    with pytest.raises(BuildError, match="CUDACXX=/nowhere/nvcc"):
        toolchain.find_nvcc({"PATH": "", "CUDACXX": "/nowhere/nvcc"}, roots=())


def test_the_toolkit_is_where_nvcc_says_and_has_to_be_whole(tmp_path: Path) -> None:
    """The nvcc on PATH may be a wrapper script far from its toolkit."""
    toolkit = tmp_path / "toolkit"
    says = (
        f"case $1 in --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2;; --version) echo V13.0.88;; *) echo compute_80; echo compute_90;; esac"
    )
    nvcc = make_program(tmp_path / "wrapper/nvcc", says)
    (toolkit / "bin").mkdir(parents=True)
    environ = {"PATH": os.environ["PATH"], "CUDACXX": str(nvcc)}
    for missing, folder in (("cuda_runtime.h", "targets/x86_64-linux/include"), ("libcudart_static.a", "lib64")):
        with pytest.raises(BuildError, match=f"{toolkit} has no {missing}.*MOE_EXT_CUDA=0"):
            toolchain.find_cuda(environ, roots=())
        (toolkit / folder).mkdir(parents=True)
        (toolkit / folder / missing).touch()
    found = toolchain.find_cuda(environ, roots=())
    assert found.version == "13.0.88" and found.lib == toolkit / "lib64" and found.archs == {80, 90}


def test_cutlass_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(root: Path, minor: int) -> Path:
        header = root / "include/cutlass/version.h"
        header.parent.mkdir(parents=True)
        header.write_text(f"#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR {minor}\n#define CUTLASS_PATCH 0\n")
        return root

    monkeypatch.setattr(toolchain, "find_package", lambda name: None)
    with pytest.raises(BuildError, match="third_party/cutlass and the nvidia-cutlass package.*pip install --no-deps nvidia-cutlass"):
        toolchain.find_cutlass({}, tmp_path)
    package = place(tmp_path / "cutlass_library/source", 2).parent
    monkeypatch.setattr(toolchain, "find_package", lambda name: package)
    assert toolchain.find_cutlass({}, tmp_path).version == "4.2.0"
    place(tmp_path / "third_party/cutlass", 3)
    assert toolchain.find_cutlass({}, tmp_path).version == "4.3.0"
    named = place(tmp_path / "named", 4)
    assert toolchain.find_cutlass({"CUTLASS_PATH": str(named)}, tmp_path).version == "4.4.0"
    with pytest.raises(BuildError, match="CUTLASS_PATH="):
        toolchain.find_cutlass({"CUTLASS_PATH": str(tmp_path / "empty")}, tmp_path)


def test_setup_ends_with_the_sentence_alone(tmp_path: Path) -> None:
    """No traceback: the last line is what a user of pip reads."""
    environ = {**os.environ, "MOE_EXT_TORCH": str(tmp_path)}
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("moe_ext: MOE_EXT_TORCH=")


# ---- loading


@needs_cuda_library
def test_cuda_library_loads_beside_the_cpu_library_in_any_torch() -> None:
    code = (
        f"import torch; torch.ops.load_library({str(CPU)!r}); torch.ops.load_library({str(CUDA)!r}); print(len(torch.ops.loaded_libraries))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_libraries_and_module_tell_the_same_build() -> None:
    code = f"""
import os, torch
from moe_ext import _C
for path in filter(os.path.exists, ({str(CPU)!r}, {str(CUDA)!r})):
    torch.ops.load_library(path)  # harmless when the import above loaded it: it is the same file
    assert _C.describe(path)["build"] == _C.build_info(), path
print(_C.build_info()["version"])
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+\.\d+", done.stdout)


def test_module_says_why_it_cannot_describe() -> None:
    code = """
import torch
from moe_ext import _C
for path in ("/nowhere/libmoe_cpu.so", torch.__path__[0] + "/lib/libtorch.so"):
    try:
        _C.describe(path)
    except RuntimeError as error:
        print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    not_loaded, no_description = done.stdout.strip().splitlines()
    assert "/nowhere/libmoe_cpu.so is not loaded" in not_loaded
    assert "exports no moe_describe" in no_description

"""The layers of the project: who may import or include whom. A new module finds its place here before it finds imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_ext.ops

PACKAGE = Path(moe_ext.ops.__file__).parent
CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Rank of each module: it may import modules of a lower rank.
RANKS = {
    "experts": 0, "_needs": 0, "testing": 0, "reference": 1, "report": 1,
    "_checks": 1, "_formulas": 2, "_autograd": 3, "_fake": 2, "_flops": 2, "ops": 3, "functional": 4, "modules": 5,
    "integrations.__init__": 5, "integrations.run.__init__": 5, "integrations.find.__init__": 5,
    "integrations.transformers_facts": 5, "integrations.usable": 5, "integrations.after_import": 5, "integrations.state": 5,
    "integrations.run.bitsandbytes": 6, "integrations.run.peft": 6, "integrations.run.stacks": 6, "integrations.run.routing": 6,
    "integrations.run.code_reading": 6, "integrations.run.look": 7, "integrations.run.unchanged": 8,
    "integrations.sandbox": 7, "integrations.run.listed": 9, "integrations.run.loop_rewrite": 7,
    "integrations.formulas": 8, "integrations.run.patch": 10, "integrations.run.decorated": 10,
    # Finding stands above all that runs at each call.
    "integrations.find.alike": 11, "integrations.find.layouts": 11, "integrations.find.modules": 12, "integrations.find.candidates": 13,
    "prove.rule": 14, "prove.call": 15, "prove.loop": 15, "prove.__init__": 16, "_blocks": 17, "_enable": 18, "_auto": 19,
    "__init__": 20, "cli.__init__": 20, "cli.command": 21, "cli.memory": 21,
    "cli.doctor": 22, "cli.demo": 22, "cli.main": 23, "__main__": 24,
}  # fmt: skip
DATA_ONLY = {"experts": set(), "reference": {"experts"}, "testing": set()}  # stand beside: they import nothing of the rest


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules named by import statements; those of the package as their path below it."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    package = path.relative_to(PACKAGE).parent.parts
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["moe_ext", *package[: len(package) - node.level + 1], *(base.split(".") if base else [])]
                base = ".".join(parts)
            is_package = (PACKAGE.parent / base.replace(".", "/")).is_dir() if base.startswith("moe_ext") else False
            found |= {f"{base}.{alias.name}" if is_package else base for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    own = {m.removeprefix("moe_ext.") for m in imports_of(path) if m.startswith("moe_ext.")}
    own |= {f"{m}.__init__" for m in own}  # a package stands for its own file
    return {m for m in own if (PACKAGE / (m.replace(".", "/") + ".py")).exists()} - {name_of(path)}


def rank(module: str) -> int:
    return RANKS[module]


def test_every_module_has_a_rank() -> None:
    unknown = [name_of(p) for p in modules() if name_of(p) not in RANKS]
    assert not unknown, f"give {unknown} a rank in this file, below everything that imports them"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    module = name_of(path)
    for other in own_imports(path):
        if module == "ops" and other in ("_autograd", "_fake", "_flops"):
            continue  # loading the ops registers their gradients and fakes
        assert rank(other) < rank(module), f"{module} (rank {rank(module)}) imports {other} (rank {rank(other)})"


@pytest.mark.parametrize("module", DATA_ONLY)
def test_data_and_reference_import_nothing_of_the_rest(module: str) -> None:
    assert own_imports(PACKAGE / f"{module}.py") <= DATA_ONLY[module]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_upper_layers_know_model_libraries(path: Path) -> None:
    """And there only inside functions: importing a module imports no model library."""
    module = name_of(path)
    libraries = {"transformers", "peft", "accelerate", "bitsandbytes"}
    at_import = {m.partition(".")[0] for m in imports_of(path, top_level_only=True)} & libraries
    assert not at_import, f"{module} imports {at_import} when it is imported"
    if rank(module) < RANKS["modules"]:
        anywhere = {m.partition(".")[0] for m in imports_of(path)} & libraries
        assert not anywhere, f"{module} imports {anywhere}"


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_model_library_and_starts_no_gpu() -> None:
    libraries = ("transformers", "peft", "accelerate", "bitsandbytes", "matplotlib")
    code = f"import sys, torch, moe_ext; print([m for m in {libraries} if m in sys.modules], torch.cuda.is_initialized())"
    assert python(code).split("\n")[0] == "[] False"


def test_ops_alone_can_be_imported() -> None:
    assert "True" in python("import torch, moe_ext.ops; print(hasattr(torch.ops.moe, 'grouped_forward'))")


# ---- C++
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def sources(layer: str) -> list[Path]:
    return sorted(p for p in (CSRC / layer).rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="the C++ sources are not beside the tests")


@needs_sources
def test_there_are_three_layers() -> None:
    assert {p.name for p in CSRC.iterdir() if p.is_dir()} == {"kernels", "ops", "registration"}
    assert all(sources(layer) for layer in ("kernels", "ops", "registration"))


@needs_sources
def test_kernels_know_neither_torch_nor_python_nor_the_layers_above() -> None:
    for path in sources("kernels"):
        text = path.read_text()
        for header in INCLUDE.findall(text):
            forbidden = re.match(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h|.*(ops|registration)/", header)
            assert not forbidden, f"{path.name} includes {header}"
        without_comments = re.sub(r"//.*", "", text)
        for word in ("getenv", "throw ", "malloc(", "std::vector", "new "):
            assert word not in without_comments, f"{path.name}: kernels do not allocate, throw or read the environment ({word.strip()})"


@needs_sources
def test_ops_use_the_stable_interface_of_torch_only() -> None:
    """What lets one binary serve every torch from 2.10 on. The introspection module may use pybind11, and no torch."""
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in [*sources("ops"), *sources("registration")]:
        for header in INCLUDE.findall(path.read_text()):
            if header.startswith(("torch/", "ATen/", "c10/")):
                assert header.startswith(stable), f"{path.name} includes {header}"
            if path.name == "module.cpp":
                assert not header.startswith("torch/"), header
            else:
                assert not header.startswith("pybind11") and header != "Python.h", f"{path.name} includes {header}"
            if path.parent.name == "ops":
                assert "registration/" not in header, f"{path.name} includes {header}: ops are below registration"


@needs_sources
def test_ops_are_the_same_sources_for_every_device() -> None:
    """What differs is declared in ops/device.h and defined in registration/, once per library."""
    for path in sources("ops"):
        headers = INCLUDE.findall(path.read_text())
        assert not [h for h in headers if re.match(r"cuda|.*kernels/(cpu|cuda)/|.*aoti_torch", h)], f"{path.name} knows a device"
    for name in ("kernel_table", "make_launch", "describe_variants"):
        defined = [
            p.name for p in [*sources("ops"), *sources("registration")] if re.search(rf"^\w[\w:&<> ]* {name}\(.*\{{", p.read_text(), re.M)
        ]
        assert defined == ["impls_cpu.cpp", "impls_cuda.cpp"], name
    launching = [p.name for p in sources("ops") if "make_launch(" in p.read_text()]
    assert launching == ["device.h", "launch.h"], "ops launch through run() of launch.h"


@needs_sources
def test_each_activation_formula_is_written_once() -> None:
    using = [p.name for p in [*sources("kernels"), *sources("ops")] if re.search(r"\b(erf|tanhf?|expm1)\s*\(", p.read_text())]
    assert using == ["activation.h"]

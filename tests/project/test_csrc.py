"""csrc/README.md is true: its table of ops, its map of kernels/cuda, its seven steps; and the one list of kernels serves every place."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import pytest

import moe_ext.ops

ROOT = next((p for p in Path(__file__).resolve().parents if (p / "csrc" / "README.md").is_file()), None)
if ROOT is None:
    pytest.skip("the C++ sources are not beside the tests", allow_module_level=True)
CSRC = ROOT / "csrc"
CUDA = CSRC / "kernels" / "cuda"
README = (CSRC / "README.md").read_text()
FILE = re.compile(r"`(\w+\.(?:cpp|cuh|cu|h|py|txt))`")


def section(title: str) -> str:
    parts = README.split(f"\n## {title}\n")
    assert len(parts) == 2, f"csrc/README.md has no section {title}"
    return parts[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def listed_kernels() -> dict[str, str]:
    """Name and parameter struct of every line of MOE_KERNELS."""
    text = (CSRC / "kernels" / "kernel_table.h").read_text()
    return dict(re.findall(r"^  F\((\w+), (\w+)\)", text, re.MULTILINE))


def schemas() -> set[str]:
    text = (CSRC / "registration" / "schemas.cpp").read_text()
    return set(re.findall(r'm\.def\(\s*"(\w+)[.(]', text))


OPS = {row[0].strip("`"): row[1:] for row in table("Where an op is")}


def test_the_table_has_every_op() -> None:
    assert set(OPS) == schemas()


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_where_the_table_says(op: str) -> None:
    cpu, cuda, glue, tests = OPS[op]
    kernel = rf"const Kernel<{listed_kernels()[op]}> {op}\b" if op in listed_kernels() else None
    for folder, cell in (("kernels/cpu", cpu), ("kernels/cuda", cuda)):
        if kernel is None:
            assert cell.startswith("of the steps"), f"{op} has no kernel of its own"
        files = FILE.findall(cell)
        found = [(CSRC / folder / name).read_text() for name in files]
        assert kernel is None or (len(found) == 1 and re.search(kernel, found[0])), f"{op} is not defined in {folder}: {files}"
        for name, text in zip(files, found, strict=True):  # of an op without a kernel of its own: those that it may call
            assert kernel or re.search(rf"> {Path(name).stem} = ", text)
    (source,) = FILE.findall(glue)
    assert re.search(rf"^[\w:<>, ]+ {op.lstrip('_')}\(", (CSRC / "ops" / source).read_text(), re.MULTILINE), f"ops/{source} has no {op}"
    (test,) = FILE.findall(tests)
    assert len(list((ROOT / "tests").rglob(test))) == 1, f"tests have no {test}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_in_the_files_of_the_seven_steps(op: str) -> None:
    steps = section("Add an op in 7 steps")
    assert [int(n) for n in re.findall(r"^(\d)\. ", steps, re.MULTILINE)] == list(range(1, 8))
    name = op.lstrip("_")
    places = {"registration/schemas.cpp": f'"{op}', "registration/impls.h": f"&{name})", "ops/ops.h": f" {name}("}
    if op in listed_kernels():
        places["kernels/kernel_table.h"] = f"F({op}, "
        assert f"struct {listed_kernels()[op]} " in (CSRC / "kernels" / "params.h").read_text()
    for file, text in places.items():
        assert file.rpartition("/")[2] in steps and text in (CSRC / file).read_text(), file
    assert "moe_ext/_fake.py" in steps and re.search(rf'"moe(_ext)?::{op}"', (ROOT / "moe_ext" / "_fake.py").read_text())
    (cases,) = (ROOT / "tests").rglob("op_table.py")
    assert "op_table.py" in steps and f'"{op}"' in cases.read_text()


def test_every_file_of_kernels_cuda_is_in_the_map_once() -> None:
    mapped = [name for row in table("kernels/cuda by role") for name in FILE.findall(row[1])]
    assert sorted(mapped) == sorted(p.name for p in CUDA.iterdir())


def test_files_that_texts_name_exist() -> None:
    """In comments and in the README; headers of others are named in #include lines only."""
    known = {p.name for folder in ("csrc", "moe_ext", "tests", "docs", "examples") for p in (ROOT / folder).rglob("*")}
    texts = {p: " ".join(re.findall(r"//(.*)", p.read_text())) for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}}
    for path, text in {**texts, CSRC / "README.md": README}.items():
        named = set(re.findall(r"(?<!\*)\b[\w-]+\.(?:cpp|cuh|cu|h|py|md|txt)\b", text))
        assert named <= known, f"{path.name} names {named - known}"


def test_no_place_repeats_the_list_of_kernels() -> None:
    """Each name is written where it is listed, defined and used; the tables, declarations and descriptions are made from the list."""
    kernels = listed_kernels()
    for file in ("kernels/cpu/kernels.h", "kernels/cpu/table.cpp", "kernels/cuda/kernels.h", "kernels/cuda/table.cpp", "ops/describe.cpp"):
        words = set(re.findall(r"\w+", (CSRC / file).read_text()))
        assert not words & set(kernels) and words & {"MOE_KERNELS", "MOE_STEP_KERNELS"}, f"{file} lists kernels itself"


@pytest.mark.parametrize("path", sorted(moe_ext.ops.CPU_LIBRARY.parent.glob("libmoe_*.so")), ids=lambda p: p.stem)
def test_a_library_describes_every_kernel_of_the_list(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    library.moe_describe.restype = ctypes.c_char_p
    described = json.loads(library.moe_describe())
    assert list(described["ops"]) == list(listed_kernels())
    lacking = [kernel for kernel, present in described["ops"].items() if not present]
    assert lacking == (described["fused"] if path.stem == "libmoe_cpu" else [])


def test_rules_name_their_needs() -> None:
    """No bits, no positions; and every named requirement is some rule's."""
    headers = {p.name: p.read_text() for p in [CUDA / "rules.h", *CUDA.glob("*_config.h")]}
    for name, text in headers.items():
        code = re.sub(r"//.*", "", text)
        assert "kRules[" not in code and not re.search(r"Rules\[\d", code) and "1 <<" not in code.replace("1 << 30", ""), name
    everything = "\n".join(headers.values())
    for requirement in re.findall(r"constexpr (?:Requirement|Needs) (k\w+)", everything):
        assert len(re.findall(rf"\b{requirement}\b", everything)) > 1, f"no rule needs {requirement}"
    listed = re.findall(r"f\(\"(\w+)\", (\w+)\);", (CUDA / "rule_tables.h").read_text())
    assert {rules for _, rules in listed} == set(re.findall(r"constexpr [\w<>]+ (\w+Rules)\[\]", everything))
    assert {name for name, _ in listed} <= set(listed_kernels())

"""`_C.rules`, `_C.explain_kernel` and `_C.explain_grouped_mm`: the rules of the CUDA library, asked without a GPU. The module is
compiled here, for a build with sm_90a and for one without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from build_tools import toolchain

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the module with")

Explain = Callable[..., dict[str, Any]]
SHAPE = {"dtype": "bfloat16", "capability": 90, "rows": 131072, "experts": 128, "N": 1536, "K": 2048}


def compile_module(folder: Path, archs: list[str]) -> Path:
    info = json.dumps(json.dumps({"cuda_archs": archs}))
    (folder / "moe_build_info.h").write_text(f"#define MOE_BUILD_INFO {info}\n")
    output = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [folder, ROOT / "csrc", toolchain.find_pybind11(toolchain.find_torch(os.environ)), toolchain.find_python_include()]
    command = ["g++", "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-shared"]
    command += [*(f"-isystem{i}" for i in includes), str(ROOT / "csrc/registration/module.cpp"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def load(output: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", output)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load(compile_module(tmp_path_factory.mktemp("module"), ["sm_80+ptx", "sm_90a"]))


@pytest.fixture(scope="module")
def explain(module: ModuleType) -> Explain:
    return lambda **changes: module.explain_grouped_mm(**{**SHAPE, **changes})


@pytest.fixture(scope="module")
def explain_kernel(module: ModuleType) -> Explain:
    return lambda op, **changes: module.explain_kernel(op, **{**SHAPE, **changes})


def test_the_kernel_and_what_the_others_need(explain: Explain) -> None:
    found = explain()
    assert found["kernel"] == "sm90_cooperative" and found["tile"] == (128, 256, 64) and "cluster" in found["reason"]
    assert found["others"] == {
        "simt": ["float32 or float64"],
        "few_rows": ["at most 16 rows, or 8 per expert"],
        "mma_elements": ["a row or matrix that does not begin at a multiple of 16 bytes"],
        "sm90_pingpong": [],
        "mma_64": ["less than 96 rows per expert"],
        "mma_128": [],
    }


def test_what_is_missing_is_named(explain: Explain) -> None:
    bias, ampere, few = explain(bias=True), explain(capability=80), explain(rows=2000)
    assert bias["kernel"] == ampere["kernel"] == "mma_128" and few["kernel"] == "sm90_pingpong"
    assert bias["others"]["sm90_cooperative"] == bias["others"]["sm90_pingpong"] == ["no bias, and nothing in the result to add to"]
    assert ampere["others"]["sm90_pingpong"] == ["a device of compute capability 9.0"]
    assert few["others"]["sm90_cooperative"] == ["256 rows per expert"]
    assert explain(accumulate=True)["kernel"] == "mma_128" and explain(accumulate=True, rows=2000)["kernel"] == "mma_64"
    assert explain(aligned=False)["kernel"] == "mma_elements" and explain(dtype="float32")["kernel"] == "simt"
    assert explain(N=1532)["others"]["sm90_cooperative"] == ["N and K that are multiples of 8"]
    assert explain(rows=1024)["kernel"] == "few_rows" and explain(rows=1024, N=1532)["kernel"] == "few_rows"
    in_eights = "K in eights, and N where a weight's outputs are contiguous"
    assert explain(rows=1024, N=1532, n_major=True)["others"]["few_rows"] == [in_eights]
    assert set(explain(wgrad=True)["others"]) == {"simt", "mma_elements", "sm90_gather", "mma_128"}
    assert explain(wgrad=True)["kernel"] == "sm90_cooperative"
    assert explain(wgrad=True)["others"]["sm90_gather"] == ["rows that are gathered"]
    assert explain(rows=128, wgrad=True)["kernel"] == explain(wgrad=True, gathered=True)["kernel"] == "sm90_gather"


@pytest.mark.parametrize("capability", [86, 89, 100, 103, 120, 121])
def test_newer_and_smaller_devices_run_mma_sync(explain: Explain, capability: int) -> None:
    assert explain(capability=capability)["kernel"] == "mma_128"
    assert explain(capability=capability, rows=2000)["kernel"] == "mma_64"


def test_one_function_for_every_table(explain: Explain, explain_kernel: Explain) -> None:
    assert explain_kernel("grouped_mm", bias=True) == explain(bias=True)
    assert explain_kernel("grouped_mm_wgrad", gathered=True) == explain(wgrad=True, gathered=True)
    up, few, ungated = explain_kernel("grouped_up"), explain_kernel("grouped_up", rows=1024), explain_kernel("grouped_up", gated=False)
    assert (up["kernel"], up["tile"]) == ("sm90_cooperative", (128, 256, 64)) and "cluster" in up["reason"]
    assert up["others"] == {"few_rows": ["at most 16 rows, or 8 per expert"], "sm90_pingpong": [], "steps": []}
    assert explain_kernel("grouped_up", rows=30000)["kernel"] == "sm90_pingpong" and few["kernel"] == "few_rows"
    assert (ungated["kernel"], ungated["tile"]) == ("steps", None)
    assert ungated["others"]["sm90_pingpong"] == ["a gated activation"]
    down, ampere = explain_kernel("grouped_down_backward"), explain_kernel("grouped_down_backward", capability=80, rows=2000)
    assert (down["kernel"], down["tile"], down["others"]) == ("sm90_pingpong", (128, 128, 64), {"steps": []})
    assert ampere["kernel"] == "steps"
    assert ampere["others"] == {"sm90_pingpong": ["a device of compute capability 9.0", "16 rows per expert"]}
    unaligned = ["rows and matrices that begin at multiples of 16 bytes", "matrices that a tensor map can describe"]
    found = explain_kernel("grouped_down_backward", aligned=False)["others"]["sm90_pingpong"]
    assert found == [*unaligned, "results whose rows begin at multiples of 16 bytes"]


def test_every_rule_of_every_table_is_listed(module: ModuleType, explain_kernel: Explain) -> None:
    tables = module.rules()
    assert list(tables) == ["grouped_mm", "grouped_mm_wgrad", "grouped_up", "grouped_down_backward"]
    for op, rules in tables.items():
        assert all(rule["reason"] and rule["kernel"] for rule in rules) and rules[-1]["needs"] == []
        assert all(rule["needs"] for rule in rules[:-1]), "a rule that needs nothing hides those below it"
        assert all((rule["tile"] is None) == (rule["kernel"] == "steps") for rule in rules)
        found = explain_kernel(op)
        assert {rule["kernel"] for rule in rules} == {found["kernel"], *found["others"]}
        (chosen,) = (rule for rule in rules if rule["reason"] == found["reason"])
        assert (chosen["kernel"], chosen["tile"]) == (found["kernel"], found["tile"])


def test_mistakes_are_named(explain: Explain) -> None:
    with pytest.raises(ValueError, match="dtype='int8' is not one of float64, float32, bfloat16, float16"):
        explain(dtype="int8")
    with pytest.raises(ValueError, match="experts at least 1"):
        explain(experts=0)


def test_an_op_without_rules_is_named(explain_kernel: Explain) -> None:
    with pytest.raises(ValueError, match="op='permute' has no table of rules; there are grouped_mm, .*, grouped_down_backward"):
        explain_kernel("permute")


def test_a_build_without_sm_90a(tmp_path: Path) -> None:
    compile_module(tmp_path, ["sm_80"])
    script = f"import _C, json; print(json.dumps(_C.explain_grouped_mm(**{SHAPE})))"  # a process of its own: one _C in each
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernel"] == "mma_128" and found["others"]["sm90_cooperative"] == ["a build for sm_90a"]

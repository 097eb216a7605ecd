"""T134: the namespace `moe` belongs to many. Whatever others register there, before or after us, both work; if another package has
taken moe::grouped_forward itself, importing raises an exception that names the place."""

from __future__ import annotations

import subprocess
import sys

import pytest

OURS = """
import torch, moe_ext
o, r, s = moe_ext.ops.sort_by_expert(torch.tensor([[0, 1], [1, 1]]), 2)
assert moe_ext.ops.permute(torch.eye(2), r, s, 2).shape == (4, 2)
w = torch.randn(2, 4, 2)
assert torch.ops.moe.grouped_forward(torch.eye(2), torch.tensor([[0], [1]]), torch.ones(2, 1), w, torch.randn(2, 2, 2)).shape == (2, 2)
"""
CUSTOM_OP = """
import torch
@torch.library.custom_op("moe::permute", mutates_args=())
def permute(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x[index]
"""
OWNER = """
import torch
library = torch.library.Library("moe", "DEF")
library.define("permute(Tensor x, Tensor index) -> Tensor")
library.impl("permute", lambda x, index: x[index], "CPU")
"""
FRAGMENT = OWNER.replace("DEF", "FRAGMENT")
THEIRS = "assert torch.equal(torch.ops.moe.permute(torch.arange(3), torch.tensor([2, 0])), torch.tensor([2, 0]))\n"


def run(*parts: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "".join(parts)], capture_output=True, text=True)


@pytest.mark.parametrize("other", ["CUSTOM_OP", "OWNER", "FRAGMENT"])
@pytest.mark.parametrize("first", ["other", "moe_ext"])
def test_T134_others_register_ops_in_moe(other: str, first: str) -> None:
    code = globals()[other]
    done = run(*((code, OURS) if first == "other" else (OURS, code)), THEIRS, OURS)
    assert done.returncode == 0, done.stderr


def test_T134_the_name_that_is_shared_is_taken() -> None:
    taken = "import torch\nlibrary = torch.library.Library('moe', 'DEF')\nlibrary.define('grouped_forward(Tensor x) -> Tensor')\n"
    caught = "import moe_ext\ntry: moe_ext.enable\nexcept ImportError as error: print('caught:', error)\n"
    done = run(taken, caught)
    assert done.returncode == 0, done.stderr
    assert "caught: moe_ext cannot be used: another library has registered moe::grouped_forward (<string>:" in done.stdout, done.stdout


def test_T134_the_name_that_is_shared_is_taken_later() -> None:
    taken = "library = torch.library.Library('moe', 'FRAGMENT')\nlibrary.define('grouped_forward(Tensor x) -> Tensor')\n"
    done = run(OURS, "\ntry:\n    ", taken.replace("\n", "\n    "), "\nexcept RuntimeError as error: print('caught:', error)\n", OURS)
    assert done.returncode == 0, done.stderr
    assert "caught:" in done.stdout and "schemas.cpp" in done.stdout, done.stdout


def test_T134_only_the_layer_is_in_the_shared_namespace() -> None:
    found = run(OURS, "print({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith('moe::')})")
    assert found.stdout.strip() == "{'moe::grouped_forward'}", found.stderr

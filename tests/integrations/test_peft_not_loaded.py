"""Where PEFT is not loaded, a forward asks nothing about adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tf4

ROOT = Path(__file__).resolve().parents[2]

# Enables a model, then makes every function about PEFT fail, and runs the model.
PROGRAM = """
import sys, types
import torch
import moe_ext
from moe_ext.integrations.run import peft
from tests.helpers.models import build, tokens

model = build("qwen3_moe")
assert moe_ext.enable(model, strict=True).enabled_count
before = model(tokens()).logits
assert not peft.is_loaded() and "peft" not in sys.modules
asked = []
for name, value in list(vars(peft).items()):
    if isinstance(value, types.FunctionType) and value.__module__ == peft.__name__ and name not in ("is_loaded", "project"):
        setattr(peft, name, lambda *args, name=name: asked.append(name))
out = model(tokens())
out.logits.sum().backward()
assert not asked, asked
print("ran", torch.equal(out.logits, before))
"""


def test_a_forward_asks_nothing_of_peft_that_is_not_loaded() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ran True"

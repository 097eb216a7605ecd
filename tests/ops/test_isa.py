"""Each CPU instruction set that was built and runs here gives results by the error rule; asking for another is one clear error.

The set is chosen once per process, so every one gets a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_ext.ops

BUILT = ("generic", "avx2", "avx512", "avx512bf16")

# Every kernel and every path of grouped_mm, against plain PyTorch. Prints the variant in use.
PROGRAM = """
import ctypes, json, sys
import torch
import moe_ext.ops
from tests.helpers.op_table import Case, CASES, results_and_gradients, to_double
from moe_ext.testing import assert_accurate
torch.set_num_threads(1)
library = ctypes.CDLL(str(moe_ext.ops.CPU_LIBRARY))
library.moe_describe.restype = ctypes.c_char_p
chosen = ("default", "long", "gpt_oss", "gelu", "ungated_relu2", "transposed", "weighted", "all", "dropped_int32")
for case in CASES:
    if case.label not in chosen:
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args, kwargs = case.inputs(dtype)
        runs = [results_and_gradients(case, f, a, kwargs) for f, a in (
            (case.function, args), (case.entry.reference, args), (case.entry.reference, to_double(args)))]
        sizes = {}
        for i, (n, p, t) in enumerate(zip(*runs)):
            key = n.shape if case.op.endswith(".list") else i
            sizes.setdefault(key, []).append((n, p, t))
        floats = []
        for group in sizes.values():
            n, p, t = (torch.cat([g[j].flatten() for g in group]) for j in range(3))
            if n.is_floating_point():
                scale = t.norm().clamp(min=1e-300)
                floats.append([n.double() / scale, p.double() / scale, t / scale])
            else:
                assert torch.equal(n, p), str(case)
        # A few numbers have no typical error: they are judged together with the most there are of a case.
        floats.sort(key=lambda parts: parts[0].numel())
        few = [parts for parts in floats[:-1] if parts[0].numel() < 100]
        for parts in floats[len(few):]:
            joined = few if parts is floats[-1] else []
            n, p, t = (torch.cat([one[j] for one in (parts, *joined)]) for j in range(3))
            assert_accurate(n, p, t, f"{case} {dtype}")
print(json.loads(library.moe_describe())["variant"])
"""


def run(isa: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    path = [str(Path(__file__).parents[2]), str(Path(moe_ext.ops.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "MOE_EXT_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("isa", BUILT)
def test_instruction_set_obeys_the_error_rule(isa: str) -> None:
    done = run(isa)
    if done.returncode and f"MOE_EXT_CPU_ISA={isa} cannot run here" in done.stderr:
        assert isa != "generic", done.stderr
        pytest.skip(f"{isa}: not built, or not a set of this processor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == isa


CALL = "import torch, moe_ext.ops; moe_ext.ops.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 1)"


def test_unknown_instruction_set_is_a_clear_error() -> None:
    done = run("sse9", CALL)
    assert done.returncode != 0 and "Traceback" in done.stderr  # an exception, not the end of the process
    assert "moe_ext::load: MOE_EXT_CPU_ISA=sse9 cannot run here; this processor runs: " in done.stderr
    assert "generic" in done.stderr.partition("this processor runs: ")[2]


def test_empty_means_the_best() -> None:
    assert run("", CALL).returncode == 0

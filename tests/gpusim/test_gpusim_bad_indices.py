"""T133: on a GPU the host does not see what offsets and maps hold. Whatever it is, no kernel reads or writes outside of its tensors;
rows that an expert does not have are skipped, entries of a map that point nowhere are taken as -1. The simulator checks every access."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_ext import ops
from moe_ext.testing import assert_accurate, simulated_gpu
from tests.gpusim.harness import folder, needs_nvcc

pytestmark = needs_nvcc

FAR = 2**30
# Offsets of 4 experts in S rows. Those that overlap are left out: two blocks would then write a row, which the simulator calls a race.
BAD_OFFSETS = {
    "past_the_rows": lambda S: [0, 3, 5, 9, 1_000_000],
    "far_past_the_rows": lambda S: [0, S // 2, S, FAR, 2**31 - 1],
    "negative": lambda S: [-100_000_000, 3, 5, 9, S],
    "least": lambda S: [-(2**31), -(2**31), 5, 9, S],
    "begins_late": lambda S: [S // 2, S // 2, S // 2 + 1, S, S],
    "all_past": lambda S: [FAR, FAR, FAR, FAR + 5, FAR + 5],
    "ends_negative": lambda S: [0, 3, 3, -1, -7],
}
SIZES = {"few_rows": (24, 64, 72), "rows": (150, 72, 136), "many_rows": (400, 136, 264), "unaligned": (40, 35, 21)}


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("bad", BAD_OFFSETS)
def test_T133_offsets_outside(bad: str, dtype: torch.dtype, architecture: int, size: str) -> None:
    S, inputs, outputs = SIZES[size]
    if S > 100 and (dtype == torch.float32 or architecture == 80) and bad not in ("past_the_rows", "negative"):
        inputs = outputs = 40  # one tile of columns: what differs is how rows are found
    with simulated_gpu(folder(), architecture):
        offsets, stack = int32(BAD_OFFSETS[bad](S)), torch.randn(4, outputs, inputs).to(dtype)
        x, g = torch.randn(S, inputs).to(dtype), torch.randn(S, outputs).to(dtype)
        ops.grouped_mm(x, stack, offsets)
        ops.grouped_mm(x, list(stack.transpose(1, 2).contiguous()), offsets, list(torch.randn(4, outputs).to(dtype)), transposed=True)
        dw, db = ops.grouped_mm_wgrad(g, x, offsets), ops.moe_ext.grouped_bias_grad(g, offsets)
        # What is left of each expert within the S rows counts.
        cut = offsets.clamp(0, S).tolist()
        parts = [g[cut[e] : max(cut[e], cut[e + 1])] for e in range(4)]
        plain, truth = (torch.stack([part.to(t).sum(0) for part in parts]) for t in (dtype, torch.float64))
        assert_accurate(db, plain, truth, "bias gradient")
        assert [bool(dw[e].any()) for e in range(4)] == [len(part) > 0 for part in parts]


@pytest.mark.parametrize("H", [64, 35])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_T133_maps_outside(dtype: torch.dtype, H: int) -> None:
    T, K = 7, 2
    S = T * K
    bad = {1: S, 3: FAR, 5: -2, 8: -(2**31), 9: 2**31 - 1}
    with simulated_gpu(folder(), 80):
        row_to_slot = slot_to_row = int32([bad.get(i, i) for i in range(S)])
        dropped = int32([-1 if i in bad else i for i in range(S)])
        x, rows, weights = torch.randn(T, H).to(dtype), torch.randn(S, H).to(dtype), torch.rand(T, K).to(dtype)
        for maps in ((row_to_slot, slot_to_row),):
            assert torch.equal(ops.permute(x, *maps, K), ops.permute(x, dropped, dropped, K))
            for w in (None, weights):
                assert torch.equal(ops.unpermute(rows, *maps, K, w), ops.unpermute(rows, dropped, dropped, K, w))
        found = ops.moe_ext.unpermute_backward(x, rows, row_to_slot, weights)
        for a, b in zip(found, ops.moe_ext.unpermute_backward(x, rows, dropped, weights), strict=True):
            assert torch.equal(a, b)

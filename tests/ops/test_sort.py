"""Routing invariants of sort_by_expert: a stable counting sort whose maps are inverse to each other, whatever the routing."""

from __future__ import annotations

import pytest
import torch

from moe_ext import ops
from tests.helpers import plain_ops
from tests.helpers.op_table import Maker, spread

KINDS = ("random", "dropped", "one", "repeated", "sparse", "all")


def check(ids: torch.Tensor, E: int) -> None:
    """Every invariant, none of them through the reference."""
    T, K = ids.shape
    S = T * K
    expert_offsets, row_to_slot, slot_to_row = ops.sort_by_expert(ids, E)
    for t, size in ((expert_offsets, E + 1), (row_to_slot, S), (slot_to_row, S)):
        assert t.dtype == torch.int32 and t.shape == (size,) and t.is_contiguous()
    flat = ids.reshape(-1).long()
    kept = (flat >= 0) & (flat < E)
    used = int(kept.sum())
    assert expert_offsets[0] == 0 and expert_offsets[E] == used
    assert torch.equal(expert_offsets.diff(), torch.bincount(flat[kept], minlength=E).int())
    assert (row_to_slot[used:] == -1).all() and torch.equal(slot_to_row >= 0, kept)
    rows = torch.arange(used)
    assert torch.equal(slot_to_row[row_to_slot[:used].long()].long(), rows)  # inverse maps; so row_to_slot is a permutation of the kept
    expert_of_row = torch.repeat_interleave(torch.arange(E), expert_offsets.diff().long())
    assert torch.equal(flat[row_to_slot[:used].long()], expert_of_row)
    same = expert_of_row.diff() == 0
    assert (row_to_slot[:used].diff()[same] > 0).all()  # stable: within an expert, slots keep their order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("T", "K", "E"), [(1, 1, 1), (50, 1, 3), (33, 4, 7), (40, 8, 8), (300, 2, 512)])
def test_invariants(kind: str, int_dtype: torch.dtype, T: int, K: int, E: int) -> None:
    ids = Maker(torch.float32, f"{kind}{T}").ids(kind, T, K, E, int_dtype)
    check(ids, E)
    for found, expected in zip(ops.sort_by_expert(ids, E), plain_ops.sort_by_expert(ids, E), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["random", "dropped", "one"])
@pytest.mark.parametrize("T", [4096, 4097, 20_000])  # with K=4: one chunk of the counting passes exactly, one more slot, several chunks
def test_invariants_across_chunks(kind: str, T: int) -> None:
    torch.set_num_threads(2)
    check(Maker(torch.float32, kind).ids(kind, T, 4, 128, torch.int64), 128)


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_extreme_ids_drop_their_slot(int_dtype: torch.dtype) -> None:
    info = torch.iinfo(int_dtype)
    ids = torch.tensor([[info.min, 0], [info.max, 4], [-1, 3], [2**31 - 1, 1]], dtype=int_dtype)
    check(ids, 4)
    assert ops.sort_by_expert(ids, 4)[2].tolist() == [-1, 0, -1, -1, -1, 2, -1, 1]


def test_ids_that_equal_an_expert_modulo_2_to_the_32_drop_their_slot() -> None:
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32), 0]])
    assert ops.sort_by_expert(ids, 4)[2].tolist() == [-1, 1, -1, 0]


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_are_read_as_they_are(layout: str) -> None:
    ids = Maker(torch.float32).ids("dropped", 12, 3, 5, torch.int64)
    if layout == "expanded":
        ids = ids[:, :1].expand(12, 3)
    view = {"transposed": ids.T.contiguous().T, "strided": spread(ids), "expanded": ids}[layout]
    assert not view.is_contiguous() and torch.equal(view, ids)
    before = view.clone()
    for found, expected in zip(ops.sort_by_expert(view, 5), plain_ops.sort_by_expert(ids.contiguous(), 5), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(view, before)  # the caller's routing is not written to


@pytest.mark.parametrize(("T", "K"), [(0, 4), (0, 1)])
def test_no_tokens(T: int, K: int) -> None:
    expert_offsets, row_to_slot, slot_to_row = ops.sort_by_expert(torch.empty(T, K, dtype=torch.int64), 3)
    assert expert_offsets.tolist() == [0, 0, 0, 0] and row_to_slot.numel() == slot_to_row.numel() == 0


@pytest.mark.parametrize(
    ("ids", "E", "message"),
    [
        (torch.zeros(2, 2), 4, "top_k_index is float32, expected int32 or int64"),
        (torch.zeros(2, 2, dtype=torch.int16), 4, "top_k_index is int16, expected int32 or int64"),
        (torch.zeros(4, dtype=torch.int64), 4, r"top_k_index has shape \[4\], expected \[T, K\]"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, "num_experts=0, expected at least 1"),
        (torch.zeros(1, 1, dtype=torch.int64).expand(2**20, 2**11), 4, r"T\*K = 2147483648 slots exceed the int32 range"),
    ],
)
def test_errors_have_the_values(ids: torch.Tensor, E: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.sort_by_expert(ids, E)

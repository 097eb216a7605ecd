"""permute, unpermute and their backward: exact copies and one rounding, rows of dropped slots neither read nor left unwritten."""

from __future__ import annotations

import pytest
import torch

from moe_ext import ops
from tests.helpers.op_table import Maker, spread

T, K, E, H = 9, 3, 4, 300  # more columns than one block of the kernels


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = ops.sort_by_expert(Maker(torch.float32, "maps").ids("dropped", T, K, E, torch.int64), E)
    assert 0 < found[0][E] < T * K
    return found


def test_permute_copies_rows(dtype: torch.dtype, maps: tuple[torch.Tensor, ...]) -> None:
    expert_offsets, r2s, s2r = maps
    x = Maker(dtype).floats(T, H)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -0.0
    rows, used = ops.permute(x, r2s, s2r, K), int(expert_offsets[E])
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    assert torch.equal(rows[:used].view(bits), x[r2s[:used].long() // K].view(bits))
    assert not rows[used:].any()


def test_permute_reads_strided_and_expanded_rows(dtype: torch.dtype, maps: tuple[torch.Tensor, ...]) -> None:
    x = Maker(dtype).floats(T, H)
    expected = ops.permute(x, *maps[1:], K)
    wide = torch.full((T, H + 7), float("nan"), dtype=dtype)
    wide[:, 3 : H + 3] = x
    for view in (wide[:, 3 : H + 3], x.T.contiguous().T, spread(x)):
        assert torch.equal(ops.permute(view, *maps[1:], K), expected)
    assert torch.equal(ops.permute(x[:1].expand(T, H), *maps[1:], K), ops.permute(x[:1].repeat(T, 1), *maps[1:], K))


@pytest.mark.parametrize("weighted", [False, True])
def test_unpermute_sums_exactly_and_rounds_once(dtype: torch.dtype, weighted: bool, maps: tuple[torch.Tensor, ...]) -> None:
    _, r2s, s2r = maps
    m = Maker(dtype, "unpermute", integers=True)
    rows = m.floats(T * K, H) * 85  # sums do not fit bfloat16's 8 bits, products neither
    w = m.routing_weights(T, K)
    rows[r2s < 0] = float("nan")  # rows of no slot
    found = ops.unpermute(rows, r2s, s2r, K, w if weighted else None)
    truth = torch.zeros(T, H, dtype=torch.float64)
    for slot, row in enumerate(s2r.tolist()):
        if row >= 0:
            truth[slot // K] += rows[row].double() * (w.flatten()[slot].double() if weighted else 1)
    assert torch.equal(found, truth.to(dtype))


def test_unpermute_adds_in_the_order_of_k() -> None:
    _, r2s, s2r = ops.sort_by_expert(torch.tensor([[2, 0, 1]]), 3)  # rows are sorted otherwise than k
    by_slot = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])  # in float32 (2^24 + 1) - 2^24 = 0; other orders give 1
    assert ops.unpermute(by_slot[r2s.long()], r2s, s2r, 3).item() == 0.0


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_routing_weights_keep_their_precision(weight_dtype: torch.dtype) -> None:
    """129/128 * 128: the product fits bfloat16, and so does 129/128. With a weight of 1 + 2^-20 only float32 and more tell."""
    _, r2s, s2r = ops.sort_by_expert(torch.tensor([[0, 0]]), 1)
    w = torch.tensor([[1 + 2.0**-7, -1.0]], dtype=weight_dtype)
    if weight_dtype != torch.bfloat16:
        w[0, 0] = 1 + 2.0**-20
    rows = torch.full((2, 1), 128.0, dtype=torch.bfloat16)
    assert ops.unpermute(rows, r2s, s2r, 2, w).item() == 128 * (w[0, 0].item() - 1)
    _, grad_w = torch.ops.moe_ext.unpermute_backward(rows[:1], rows, r2s, w)
    assert grad_w.dtype == weight_dtype and (grad_w == 128 * 128).all()


def test_unpermute_backward_exact(dtype: torch.dtype, maps: tuple[torch.Tensor, ...]) -> None:
    _, r2s, _ = maps
    m = Maker(dtype, "backward", integers=True)
    grad, rows, w = m.floats(T, H), m.floats(T * K, H), m.routing_weights(T, K).float()
    rows[r2s < 0] = float("nan")
    grad_rows, grad_w = torch.ops.moe_ext.unpermute_backward(grad, rows, r2s, w)
    truth_rows, truth_w = torch.zeros(T * K, H, dtype=torch.float64), torch.zeros(T * K, dtype=torch.float64)
    for row, slot in enumerate(r2s.tolist()):
        if slot >= 0:
            truth_rows[row] = grad[slot // K].double() * w.flatten()[slot].double()
            truth_w[slot] = (grad[slot // K].double() * rows[row].double()).sum()
    assert torch.equal(grad_rows, truth_rows.to(dtype))
    assert torch.equal(grad_w, truth_w.view(T, K).float())  # in the routing weights' dtype, summed in at least float32


def test_permute_and_unpermute_are_each_others_gradient(dtype: torch.dtype, maps: tuple[torch.Tensor, ...]) -> None:
    _, r2s, s2r = maps
    m = Maker(dtype, "adjoint", integers=True)
    x, rows, g_rows, g = m.floats(T, H), m.floats(T * K, H), m.floats(T * K, H), m.floats(T, H)
    x.requires_grad_(), rows.requires_grad_()
    (dx,) = torch.autograd.grad(ops.permute(x, r2s, s2r, K), x, g_rows)
    (d_rows,) = torch.autograd.grad(ops.unpermute(rows, r2s, s2r, K), rows, g)
    assert torch.equal(dx, ops.unpermute(g_rows, r2s, s2r, K)) and torch.equal(d_rows, ops.permute(g, r2s, s2r, K))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has T=3 rows and top_k=2 but row_to_slot has 4 entries"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, "x is int32; float64, float32, bfloat16 and float16 are supported"),
        ({"x": torch.zeros(2, 4, 1)}, r"x has shape \[2, 4, 1\], expected \[T, H\]"),
        ({"r2s": torch.zeros(4, dtype=torch.int64)}, "row_to_slot is int64, expected int32 as sort_by_expert returns it"),
        ({"s2r": torch.zeros(3, dtype=torch.int32)}, r"slot_to_row has shape \[3\], expected \[4\]"),
        ({"top_k": 3}, "top_k=3 does not divide the S=4 slots"),
        ({"top_k": 0}, "top_k=0 does not divide the S=4 slots"),
    ],
)
def test_errors_have_the_values(change: dict[str, object], message: str) -> None:
    args = {"x": torch.zeros(2, 4), "r2s": torch.arange(4, dtype=torch.int32), "s2r": torch.arange(4, dtype=torch.int32), "top_k": 2}
    ops.permute(*args.values())
    with pytest.raises(RuntimeError, match=f"moe_ext::permute: {message}"):
        ops.permute(*(args | change).values())


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (torch.zeros(3, 4), None, r"rows has shape \[3, 4\], expected \[4, 4\]"),
        (torch.zeros(4, 4), torch.zeros(2, 1), r"top_k_weights has shape \[2, 1\], expected \[2, 2\]"),
        (torch.zeros(4, 4), torch.zeros(2, 2, dtype=torch.int64), "top_k_weights is int64"),
    ],
)
def test_unpermute_errors_have_the_values(rows: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    maps = torch.arange(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"moe_ext::unpermute: {message}"):
        ops.unpermute(rows, maps, maps, 2, weights)

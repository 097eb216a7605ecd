"""grouped_mm, its list form, and the gradients of weights and biases. On whole numbers every sum is exact, so results must equal
the truth rounded once, in every dtype, layout and kernel; what may not be read holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_ext import ops
from tests.helpers.op_table import Maker, spread

NAN = float("nan")


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def truth(x: torch.Tensor, weight: torch.Tensor, counts: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    """[S, N] in float64; weight [E, N, K]."""
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64)
    for e, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        out[rows] = x[rows].double() @ weight[e].double().T
        if bias is not None:
            out[rows] += bias[e].double()
    return out.to(x.dtype)


def inside_nan(t: torch.Tensor) -> torch.Tensor:
    """The same values, surrounded by NaN before, after and between rows."""
    wide = torch.full([n + 4 for n in t.shape], NAN, dtype=t.dtype)
    return wide[tuple(slice(2, n + 2) for n in t.shape)].copy_(t)


Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, Layout] = {  # [E, N, K] to the same values in other memory
    "contiguous": lambda w: w,
    "columns": lambda w: w.mT.contiguous().mT,
    "inside_nan": inside_nan,
    "columns_inside_nan": lambda w: inside_nan(w.mT).mT,
    "no_stride_is_1": lambda w: spread(spread(w, 1), 2),
    "experts_last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}
SIZES = {  # rows per expert; N, K. Sizes above and below the blocks, segments and row thresholds of the CPU kernels
    "every_height": (list(range(41)), 45, 37),
    "several_blocks": ([100, 0, 5, 13], 150, 300),
    "wide": ([3, 7, 0], 1030, 19),
    "single": ([1, 1], 1, 1),
    "one_output": ([2, 9, 30], 1, 33),
    "one_input": ([2, 9, 30], 33, 1),
    "deep": ([1, 4], 3, 1025),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_exact_on_whole_numbers(dtype: torch.dtype, size: str, layout: str) -> None:
    counts, N, K = SIZES[size]
    m, unused = Maker(dtype, size, integers=True), 3
    x, w, b = m.floats(sum(counts) + unused, K), m.floats(len(counts), N, K), m.floats(len(counts), N)
    expected = truth(x, w, counts, b)
    x[sum(counts) :] = NAN  # rows past the last expert's: not read
    w[torch.tensor(counts) == 0] = NAN  # experts without rows: not read
    b[torch.tensor(counts) == 0] = NAN
    view = LAYOUTS[layout](w)
    for transposed in (False, True):
        weight = view.mT if transposed else view
        found = ops.grouped_mm(inside_nan(x), weight, offsets_of(counts), inside_nan(b), transposed=transposed)
        assert torch.equal(found, expected)
        assert torch.equal(ops.grouped_mm(x, list(weight), offsets_of(counts), list(inside_nan(b)), transposed=transposed), expected)
    assert torch.equal(ops.grouped_mm(x, view, offsets_of(counts)), truth(x.nan_to_num(), w.nan_to_num(), counts, None))


def test_expanded_weights_are_read_through_stride_0(dtype: torch.dtype) -> None:
    m, counts = Maker(dtype, integers=True), [4, 0, 20]
    x, w, b = m.floats(24, 9), m.floats(1, 7, 9).expand(3, -1, -1), m.floats(1, 7).expand(3, -1)
    assert torch.equal(ops.grouped_mm(x, w, offsets_of(counts), b), truth(x, w, counts, b))
    assert torch.equal(ops.grouped_mm(x[:1].expand(24, 9), w, offsets_of(counts)), truth(x[:1].expand(24, 9), w, counts, None))


def test_list_of_unlike_layouts(dtype: torch.dtype) -> None:
    m, counts = Maker(dtype, integers=True), [4, 3, 20]
    x, w = m.floats(27, 9), m.floats(3, 7, 9)
    mixed = [w[0], w[1].T.contiguous().T, inside_nan(w[2])]
    assert torch.equal(ops.grouped_mm(x, mixed, offsets_of(counts)), truth(x, w, counts, None))


@pytest.mark.parametrize("transposed", [False, True])
def test_list_equals_stacked_bit_for_bit(dtype: torch.dtype, transposed: bool) -> None:
    m, counts = Maker(dtype, "bits"), [0, 1, 5, 13, 40]
    x, w, b = m.floats(59, 33), m.floats(5, *((33, 21) if transposed else (21, 33))), m.floats(5, 21)
    stacked = ops.grouped_mm(x, w, offsets_of(counts), b, transposed=transposed)
    assert torch.equal(ops.grouped_mm(x, list(w), offsets_of(counts), list(b), transposed=transposed), stacked)
    assert torch.equal(
        ops.grouped_mm(x, [e.clone() for e in w], offsets_of(counts), [e.clone() for e in b], transposed=transposed), stacked
    )


def test_a_row_does_not_depend_on_its_neighbours_columns(dtype: torch.dtype) -> None:
    """An output is the same bits whether its weight row stands alone or not: so split projections agree."""
    m, counts = Maker(dtype, "split"), [1, 7, 30]
    x, w = m.floats(38, 50), m.floats(3, 44, 50)
    whole = ops.grouped_mm(x, w, offsets_of(counts))
    halves = [ops.grouped_mm(x, part, offsets_of(counts)) for part in (w[:, :20], w[:, 20:])]
    assert torch.equal(torch.cat(halves, 1), whole)


@pytest.mark.parametrize("size", SIZES)
def test_weight_and_bias_gradients_are_exact_on_whole_numbers(dtype: torch.dtype, size: str) -> None:
    counts, M, N = SIZES[size]
    m = Maker(dtype, f"wgrad{size}", integers=True)
    S = sum(counts) + 3
    a, b, offsets = m.floats(S, M), m.floats(S, N), offsets_of(counts)
    segments = list(torch.arange(sum(counts)).split(counts))
    dw = torch.stack([a[rows].double().T @ b[rows].double() for rows in segments]).to(dtype)
    db = torch.stack([a[rows].double().sum(0) for rows in segments]).to(dtype)
    a[sum(counts) :], b[sum(counts) :] = NAN, NAN
    for first, second in ((a, b), (inside_nan(a), inside_nan(b)), (spread(a), b.T.contiguous().T)):
        assert torch.equal(ops.grouped_mm_wgrad(first, second, offsets), dw)
        assert torch.equal(torch.stack(torch.ops.moe_ext.grouped_mm_wgrad.list(first, second, offsets)), dw)
        assert torch.equal(torch.ops.moe_ext.grouped_bias_grad(first, offsets), db)


def test_float32_is_not_rounded_to_less(dtype: torch.dtype) -> None:
    """One product whose factors need all bits of their dtype, and a sum that needs float32 although the operands are narrow."""
    one_more = 1 + torch.finfo(dtype).eps
    assert ops.grouped_mm(torch.full((1, 1), one_more, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype), offsets_of([1])).item() == one_more
    x = torch.ones(1, 4098, dtype=dtype)  # 4097 - 4096: in bfloat16 or float16 the ones would stop counting on the way
    x[0, 4097] = -4096
    assert ops.grouped_mm(x, torch.ones(1, 1, 4098, dtype=dtype), offsets_of([1])).item() == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, "x has 5 columns but weight maps 6 inputs to 7 outputs"),
        ({"x": torch.zeros(4)}, r"x has shape \[4\], expected \[S, \*\]"),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, "weight is float32 but x is int64"),
        ({"weight": torch.zeros(2, 7, 6, dtype=torch.bfloat16)}, "weight is bfloat16 but x is float32; cast one of them, or run under"),
        ({"weight": torch.zeros(7, 6)}, r"weight has shape \[7, 6\], expected \[E, N, K\]"),
        ({"weight": torch.zeros(3, 7, 6)}, r"expert_offsets has 3 entries for E=3 experts, expected E\+1|bias has shape"),
        ({"weight": [torch.zeros(7, 6), torch.zeros(7, 5)]}, r"a weight of the list has shape \[7, 5\], expected \[7, 6\]"),
        ({"weight": []}, "the list of weights is empty"),
        ({"offsets": torch.zeros(3, dtype=torch.int64)}, "expert_offsets is int64, expected int32"),
        ({"offsets": torch.zeros(6, dtype=torch.int32)[::2]}, "expert_offsets must be contiguous"),
        ({"bias": torch.zeros(2, 6)}, r"bias has shape \[2, 6\], expected \[2, 7\]"),
        ({"bias": torch.zeros(2, 7, dtype=torch.float64)}, "bias is float64 but x is float32"),
    ],
)
def test_errors_have_the_values(change: dict[str, object], message: str) -> None:
    args = {"x": torch.zeros(4, 6), "weight": torch.zeros(2, 7, 6), "offsets": offsets_of([1, 2]), "bias": torch.zeros(2, 7)}
    ops.grouped_mm(*args.values())
    if isinstance(change.get("weight"), list):
        args["bias"] = None
    with pytest.raises(RuntimeError, match=f"moe_ext::grouped_mm: ({message})"):
        ops.grouped_mm(*(args | change).values())


def test_wgrad_errors_have_the_values() -> None:
    with pytest.raises(RuntimeError, match=r"moe_ext::grouped_mm_wgrad: a has shape \[4, 2\] and b \[3, 2\]; both need the same S rows"):
        ops.grouped_mm_wgrad(torch.zeros(4, 2), torch.zeros(3, 2), offsets_of([4]))
    with pytest.raises(RuntimeError, match="b is float64 but a is float32"):
        ops.grouped_mm_wgrad(torch.zeros(4, 2), torch.zeros(4, 2).double(), offsets_of([4]))

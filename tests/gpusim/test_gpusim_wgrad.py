"""grouped_mm_wgrad on a simulated H100 with rows gathered as they are loaded, without the op around it.

What the kernel has no business with is NaN: rows that belong to nobody, source rows that no slot refers to, columns beside the
operands, everything around the results, and the results before the call. Everything the simulator checks is checked on the way.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moe_ext.testing import assert_accurate, simulated_gpu
from tests.gpusim import fused
from tests.gpusim.harness import folder, needs_nvcc
from tests.gpusim.mutations import kernels_of_9_0
from tests.gpusim.orders import assert_same_bits_in_any_order
from tests.helpers import plain_ops
from tests.helpers.op_table import Case as OpCase
from tests.helpers.op_table import Inputs, Maker, layer, listed, results_and_gradients, to_double

pytestmark = needs_nvcc
KERNEL = "wgrad_gather_kernel"
GUARD = 8  # columns beside operands and results


@dataclass(frozen=True)
class Case:
    """Sides of a result, rows of each expert, slots that are dropped, which operands are gathered (with top_k), layout of results."""

    M: int
    N: int
    counts: tuple[int, ...]
    gathered: str = "b"
    top_k: int = 2
    dropped: int = 5
    listed: bool = False

    def __str__(self) -> str:
        counts = "_".join(map(str, self.counts)) if len(self.counts) < 9 else f"{len(self.counts)}_experts"
        return f"{self.M}x{self.N}-{counts}-{self.gathered or 'in_place'}" + ("-list" if self.listed else "")


COUNTS = (0, 1, 7, 63, 64, 65, 200)
MANY = tuple(7 * e % 11 * (e % 3) for e in range(130))  # more experts than a warp has lanes, a third of them without rows
TAILS = [
    Case(136, 264, COUNTS, "b"),
    Case(136, 264, COUNTS, "a", top_k=3),
    Case(136, 264, COUNTS, "ab"),
    Case(136, 264, COUNTS, "", dropped=70),
]
SHAPES = [
    Case(8, 8, (0, 3, 0)),
    Case(128, 256, (64, 128), "a", top_k=1, dropped=0),
    Case(72, 520, (90, 0, 33), "a"),
    Case(392, 72, (17, 130), "b"),
    Case(1160, 264, (5, 0), "b"),  # more row tiles than a band has
    Case(64, 200, (0, 900, 30, 0), "b", top_k=8),  # several rounds of the ring
    Case(200, 40, (0, 0, 0), "a", dropped=9),  # rows, but of nobody
    Case(72, 16, MANY, "b"),
]
LISTS = [replace(TAILS[0], listed=True), replace(SHAPES[2], listed=True), replace(SHAPES[7], listed=True)]
MODE_CASES = [TAILS[0], TAILS[3], SHAPES[5], replace(SHAPES[7], listed=True)]


@dataclass
class Operand:
    """`source` with `row_to_slot`, or rows as they lie; `rows` are its S rows in float64, zero where they belong to nobody."""

    source: Tensor
    row_to_slot: Tensor | None
    top_k: int
    rows: Tensor

    @property
    def params(self) -> fused.Rows:
        return fused.rows(self.source, self.row_to_slot, self.top_k)


@dataclass
class Given:
    a: Operand
    b: Operand
    offsets: Tensor
    S: int


def inside(values: Tensor) -> Tensor:
    """The same values between columns of NaN."""
    wide = torch.full((len(values), values.shape[1] + 2 * GUARD), float("nan"), dtype=values.dtype)
    wide[:, GUARD:-GUARD] = values
    return wide[:, GUARD:-GUARD]


def make(c: Case, dtype: torch.dtype, integers: bool = False, nan_experts: tuple[int, ...] = ()) -> Given:
    """Rows of `nan_experts` are NaN; with top_k = 1 no other expert has any of them."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{c.M} {c.N} {c.counts}".encode()))
    offsets = torch.tensor((0, *c.counts)).cumsum(0).int()
    used = int(offsets[-1])
    T = -(-(used + c.dropped) // c.top_k)
    S = T * c.top_k

    def floats(rows: int, columns: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, (rows, columns), generator=random).to(dtype)
        return torch.randn((rows, columns), generator=random).to(dtype)

    slots = torch.randperm(S, generator=random).int()
    slots[used:] = -1
    poisoned = torch.zeros(S, dtype=torch.bool)
    for e in nan_experts:
        poisoned[offsets[e] : offsets[e + 1]] = True

    def operand(columns: int, is_gathered: bool) -> Operand:
        values = floats(T if is_gathered else S, columns)
        tokens = slots[:used].long() // c.top_k if is_gathered else torch.arange(used)
        unused = torch.ones(len(values), dtype=torch.bool)
        unused[tokens] = False
        unused[tokens[poisoned[:used]]] = True
        rows = torch.zeros(S, columns, dtype=torch.float64)
        rows[:used] = values[tokens].double()
        values[unused] = float("nan")
        return Operand(inside(values), slots if is_gathered else None, c.top_k, rows)

    return Given(operand(c.M, "a" in c.gathered), operand(c.N, "b" in c.gathered), offsets, S)


def run_kernel(c: Case, g: Given) -> Tensor:
    """E x (M, N); what lies between and around the results must stay NaN."""
    E, dtype = len(c.counts), g.a.source.dtype
    wholes = [torch.full((c.M + 2, c.N + 2 * GUARD), float("nan"), dtype=dtype) for _ in range(E if c.listed else 1)]
    if c.listed:
        out: fused.Stack = [w[1:-1, GUARD:-GUARD] for w in wholes]
    else:
        wholes = [torch.full((E, *wholes[0].shape), float("nan"), dtype=dtype)]
        out = wholes[0][:, 1:-1, GUARD:-GUARD]
    status = fused.grouped_mm_wgrad(g.a.params, g.b.params, g.offsets, g.S, out)
    assert status == "ok", status
    result = torch.stack(list(out))
    for w in wholes:
        w[..., 1:-1, GUARD:-GUARD] = float("nan")
        assert w.isnan().all(), "something around the results was written"
    return result


def expected(g: Given, dtype: torch.dtype) -> Tensor:
    return plain_ops.grouped_mm_wgrad(g.a.rows.to(dtype), g.b.rows.to(dtype), g.offsets)


def needs_kernel() -> None:
    if not kernels_of_9_0():
        pytest.skip("CUTLASS is not installed, so the library has no kernels of sm_90a")


def check(c: Case, dtype: torch.dtype) -> None:
    needs_kernel()
    with simulated_gpu(folder(), 90) as gpu:
        g = make(c, dtype)
        gpu.take_launches()  # those of other tests
        new = run_kernel(c, g)
        ran = [launch["kernel"] for launch in gpu.take_launches() if "store_kernel" not in launch["kernel"]]
    assert len(ran) == 2 and "order_kernel" in ran[0] and KERNEL in ran[1], ran
    assert_accurate(new, expected(g, dtype), expected(g, torch.float64))
    for e, count in enumerate(c.counts):
        assert count or not new[e].any(), f"expert {e} has no rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*TAILS, *SHAPES], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", LISTS, ids=str)
def test_lists_of_results(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("case", [*TAILS, SHAPES[7]], ids=str)
def test_whole_numbers_are_exact(case: Case) -> None:
    needs_kernel()
    with simulated_gpu(folder(), 90):
        g = make(case, torch.float16, integers=True)
        assert torch.equal(run_kernel(case, g).double(), expected(g, torch.float64))


@pytest.mark.parametrize("gathered", ["", "a", "b", "ab"])
def test_rows_of_one_expert_reach_no_other(gathered: str) -> None:
    """The rows before and behind an expert's are loaded in the same step as its own, and 0 * NaN is NaN."""
    needs_kernel()
    case = Case(72, 136, (5, 70, 3, 64, 0, 1, 30), gathered, top_k=1)
    odd = tuple(range(1, len(case.counts), 2))
    with simulated_gpu(folder(), 90):
        clean = run_kernel(case, make(case, torch.bfloat16))
        among_nan = run_kernel(case, make(case, torch.bfloat16, nan_experts=odd))
    assert torch.equal(among_nan[::2], clean[::2])
    assert among_nan[1::2].isnan().all()


@pytest.mark.parametrize("case", MODE_CASES, ids=str)
def test_any_order_of_events(case: Case) -> None:
    needs_kernel()
    assert_same_bits_in_any_order(lambda: [run_kernel(case, make(case, torch.bfloat16))])


# Layers whose weight gradients gather x for the up projection and the gradient for the down projection.
LAYERS = {
    "stacked": layer(T=150, K=2, E=4, H=136, I=72, ids="dropped"),
    "transposed": layer(T=90, K=3, E=9, H=72, I=136, ids="sparse", transposed=True),
    "list": listed(layer(T=150, K=2, E=4, H=136, I=72, ids="dropped")),
}


class LayerCase(OpCase):
    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        return LAYERS[self.label](Maker(dtype, f"{self}/{draw}", integers))


@pytest.mark.parametrize("label", LAYERS)
def test_gradients_of_a_layer(label: str) -> None:
    needs_kernel()
    case = LayerCase("grouped_forward.list" if label == "list" else "grouped_forward", label)
    with simulated_gpu(folder(), 90) as gpu:
        args, kwargs = case.inputs(torch.bfloat16)
        gpu.take_launches()  # those of other tests
        new = results_and_gradients(case, case.function, args, kwargs)
        ran = [launch["kernel"] for launch in gpu.take_launches()]
    assert sum(KERNEL in kernel for kernel in ran) == (3 if label == "list" else 2)  # gate, up and down, or both in one, and down
    plain = results_and_gradients(case, case.entry.reference, args, kwargs)
    truth = results_and_gradients(case, case.entry.reference, to_double(args), kwargs)
    experts = 4 if label == "list" else 1  # a list's tensors are judged together
    groups = [[0], [1], [2]] + [list(range(i, i + experts)) for i in range(3, len(new), experts)]
    for group in groups:
        n, p, t = (torch.cat([values[i].flatten() for i in group]) for values in (new, plain, truth))
        assert_accurate(n, p, t, f"tensor {group[0]}")

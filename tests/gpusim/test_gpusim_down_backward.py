"""grouped_down_backward on a simulated H100: the down projection's input gradient, the activation's backward and the routing
weights' gradient in one product, first without the op around it, then through the layer's backward and through autograd.

What the kernel has no business with is NaN: gradients of tokens without a slot, weights of dropped slots, rows of dropped slots and
rows around every array, weights of experts without rows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moe_ext import reference
from moe_ext._needs import Needs
from moe_ext.testing import assert_accurate, simulated_gpu
from tests.gpusim import fused
from tests.gpusim.harness import folder, needs_nvcc
from tests.gpusim.mutations import Mutation
from tests.gpusim.orders import assert_same_bits_in_any_order, noticed
from tests.gpusim.test_gpusim_up import GUARD, LAYOUTS, Case, guarded, needs_kernel
from tests.helpers import plain_ops
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import ALL_LISTED, ALL_STACKED, GPT_OSS, Inputs, Maker, backward_of, layer
from tests.helpers.op_table import Case as TableCase

pytestmark = needs_nvcc
RESULTS = ("grad_pre", "scaled", "grad_weights")

# Tails in every direction, experts without rows, with one, with 16, with more than a tile; the layout is that of all the experts'
# weights: "halves" is [E, H, I] with a pre-activation in halves, "transposed" is [E, I, H].
SHAPES = [
    Case(64, 64, 3, 24),
    Case(256, 192, 2, 150, ids="skewed"),
    Case(328, 136, 4, 70, ids="sparse", bias=True),
    Case(264, 360, 3, 60, ids="dropped", bias=True),
    Case(72, 8, 5, 90, ids="skewed"),
    Case(320, 128, 1, 16, K=1, bias=True),
    Case(136, 40, 1, 17, K=1),
    Case(64, 72, 40, 330, ids="dropped"),
]
LAYOUT_CASES = [replace(c, layout=layout) for layout in LAYOUTS for c in (SHAPES[2], SHAPES[3])]
ACTIVATIONS = [
    replace(SHAPES[3], I=136, activation=activation, limit=limit, layout=layout)
    for activation, limit in (("gelu", None), ("gelu_tanh", None), ("relu", 0.7), ("relu2", None), ("swigluoai", 0.8), ("silu", 0.5))
    for layout in ("halves", "transposed_interleaved")
]
MANY_TILES = Case(392, 392, 2, 200, ids="skewed")  # two for each consumer, of more k-blocks than there are stages
MODE_CASES = {
    "halves": MANY_TILES,
    "interleaved": replace(SHAPES[3], layout="transposed_interleaved"),
    "list": replace(SHAPES[2], layout="list"),
}


@dataclass
class Tensors:
    """`down` is E x (I, H), as views of whatever the layout keeps it in."""

    grad: Tensor
    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    pre_act: Tensor
    weights: Tensor
    down: Tensor | list[Tensor]
    bias: Tensor | list[Tensor] | None


def make(c: Case, dtype: torch.dtype, integers: bool = False) -> Tensors:
    m = Maker(dtype, f"{c}/down", integers)
    nan = float("nan")
    ids = c.routing(torch.Generator().manual_seed(zlib.crc32(str(c).encode())))
    dropped = (ids < 0) | (ids >= c.E)
    offsets, row_to_slot, slot_to_row = plain_ops.sort_by_expert(ids, c.E)
    grad = m.floats(c.T, c.H)
    grad[dropped.all(1)] = nan
    whole, pre_act = guarded(c.T * c.K, 2 * c.I, dtype)
    used = int(offsets[-1])
    pre_act[:used] = m.floats(used, 2 * c.I)
    weights = m.routing_weights(c.T, c.K).float().masked_fill(dropped, nan)
    has_rows = (offsets.diff() > 0)[:, None, None]
    down = m.floats(c.E, c.I, c.H, fan_in=c.I).where(has_rows, nan)
    if not c.spec.transposed:
        down = down.mT.contiguous().mT
    listed = c.layout.startswith("list")
    bias = m.floats(c.E, c.H).where(has_rows[:, :, 0], nan) if c.bias else None
    return Tensors(
        grad, offsets, row_to_slot, slot_to_row, pre_act, weights,
        [d.clone() for d in down] if listed else down, [b.clone() for b in bias] if bias is not None and listed else bias,
    )  # fmt: skip


def run_kernel(c: Case, t: Tensors, wanted: tuple[str, ...] = RESULTS, weighted: bool = True) -> dict[str, Tensor]:
    S, dtype = c.T * c.K, t.grad.dtype
    whole, out = {}, {}
    for name, width in (("grad_pre", 2 * c.I), ("scaled", c.I)):
        whole[name], out[name] = guarded(S, width, dtype)
    whole["grad_weights"], out["grad_weights"] = guarded(S, 1, torch.float32)
    out["grad_weights"].zero_()  # as the op does: there is no row for the slots that were dropped
    given = [out[name] if name in wanted else None for name in RESULTS]
    weights = t.weights if weighted else None
    status = fused.grouped_down_backward(
        t.grad, t.row_to_slot, c.K, t.offsets, t.down, t.bias, c.spec, t.pre_act, weights, given[0], given[1], given[2]
    )
    assert status == "ok", status
    for name, w in whole.items():
        assert w[:GUARD].isnan().all() and w[-GUARD:].isnan().all(), f"rows around {name} were written"
        if name not in wanted and name != "grad_weights":
            assert w.isnan().all(), f"{name} was not asked for"
    return {name: out[name] for name in wanted}


def expected(c: Case, t: Tensors, dtype: torch.dtype, weighted: bool = True) -> dict[str, Tensor]:
    """By autograd through everything after the pre-activation, in plain PyTorch."""

    def clean(x: Tensor) -> Tensor:
        return x.nan_to_num(0.0).to(dtype)

    pre_act = clean(t.pre_act).requires_grad_()
    weights = t.weights.nan_to_num(0.0).to(torch.float64 if dtype == torch.float64 else torch.float32)
    weights = (weights if weighted else torch.ones_like(weights)).requires_grad_()
    bias = None if t.bias is None else [clean(b) for b in t.bias]
    activation = reference.activation(pre_act, c.spec)
    y = plain_ops.grouped_mm(activation, [clean(d).mT for d in t.down], t.offsets, bias)
    out = plain_ops.unpermute(y, t.row_to_slot, t.slot_to_row, c.K, weights)
    grad_pre, grad_weights = torch.autograd.grad(out, (pre_act, weights), clean(t.grad))
    w_rows = plain_ops.permute(weights.detach().reshape(-1, 1), t.row_to_slot, t.slot_to_row, 1)
    scaled = (w_rows * activation.detach()).to(dtype)
    return {"grad_pre": grad_pre, "scaled": scaled, "grad_weights": grad_weights.reshape(-1, 1)}


def ran(gpu: object, name: str = "DownBackwardEpilogue") -> bool:
    return any(name in launch["kernel"] for launch in gpu.take_launches())  # type: ignore[attr-defined]


def check(c: Case, dtype: torch.dtype, wanted: tuple[str, ...] = RESULTS, weighted: bool = True) -> None:
    with simulated_gpu(folder(), 90) as gpu:
        t = make(c, dtype)
        new = run_kernel(c, t, wanted, weighted)
        assert ran(gpu)
    plain, truth = expected(c, t, dtype, weighted), expected(c, t, torch.float64, weighted)
    for name in wanted:
        assert_accurate(new[name], plain[name], truth[name], name)
        unused = t.slot_to_row[:, None] < 0 if name == "grad_weights" else torch.arange(len(t.pre_act))[:, None] >= t.offsets[-1]
        assert (new[name].where(unused, 0) == 0).all(), f"{name} of dropped slots is not zero"


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    needs_kernel()
    for dtype in (torch.bfloat16, torch.float16):
        check(case, dtype)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_layouts(case: Case) -> None:
    needs_kernel()
    check(case, torch.bfloat16)


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_activations(case: Case) -> None:
    needs_kernel()
    for dtype in (torch.bfloat16, torch.float16):
        check(case, dtype)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("wanted", [RESULTS[:1], RESULTS[1:2], RESULTS[2:], RESULTS[::2]], ids="+".join)
def test_only_what_is_wanted(wanted: tuple[str, ...], weighted: bool) -> None:
    """It is what is written when everything is wanted, and nothing else is written."""
    needs_kernel()
    case = replace(SHAPES[3], layout="interleaved" if weighted else "halves")
    check(case, torch.bfloat16, wanted, weighted)
    with simulated_gpu(folder(), 90):
        t = make(case, torch.bfloat16)
        everything = run_kernel(case, t, weighted=weighted)
        assert all(torch.equal(x, everything[name]) for name, x in run_kernel(case, t, wanted, weighted).items())


@pytest.mark.parametrize("case", [replace(c, activation="relu") for c in (*SHAPES[:4], LAYOUT_CASES[3])], ids=str)
def test_whole_numbers_are_exact(case: Case) -> None:
    needs_kernel()
    with simulated_gpu(folder(), 90):
        t = make(case, torch.float16, integers=True)
        new = run_kernel(case, t)
    for name, truth in expected(case, t, torch.float64).items():
        assert torch.equal(new[name], truth.to(new[name].dtype)), name


def test_a_row_does_not_depend_on_the_others() -> None:
    """The same token, routed alike, in another batch."""
    needs_kernel()
    case = replace(SHAPES[1], K=1)
    with simulated_gpu(folder(), 90):
        t = make(case, torch.bfloat16)
        everything = run_kernel(case, t)
        kept = torch.arange(case.T) % 3 > 0  # of the tokens, thus of the slots
        rows = kept[t.row_to_slot.long()]
        counts = [int(rows[a:b].sum()) for a, b in zip(t.offsets.tolist(), t.offsets[1:].tolist(), strict=False)]
        renumbered = kept.cumsum(0) - 1
        row_to_slot = renumbered[t.row_to_slot.long()[rows]].int()
        offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        some = Tensors(t.grad[kept], offsets, row_to_slot, t.slot_to_row, t.pre_act[rows], t.weights[kept], t.down, t.bias)
        found = run_kernel(replace(case, T=int(kept.sum())), some)
    for name in RESULTS:
        assert torch.equal(found[name], everything[name][kept if name == "grad_weights" else rows]), name


def results(c: Case) -> tuple[Tensor, ...]:
    return tuple(run_kernel(c, make(c, torch.bfloat16)).values())


@pytest.mark.parametrize("name", MODE_CASES)
def test_any_order_of_events(name: str) -> None:
    needs_kernel()
    assert_same_bits_in_any_order(lambda: results(MODE_CASES[name]))


def test_every_kernel_runs() -> None:
    """Both element types and both orders of the weights: the list of kernels in the library against the list of those that ran."""
    needs_kernel()
    with simulated_gpu(folder(), 90) as gpu:
        for layout in ("halves", "transposed"):
            for dtype in (torch.bfloat16, torch.float16):
                case = replace(SHAPES[0], layout=layout)
                run_kernel(case, make(case, dtype))
        seen = {launch["kernel"] for launch in gpu.take_launches()}
        missing = {n for n in gpu.kernels() if "grouped_down_backward_sm90" in n} - seen
    assert not missing, "\n".join(sorted(missing))


REFUSED = ("float32", "H", "I", "no rows", "few rows", "grad", "pre_act", "bias", "ungated", "capability 8.0")


@pytest.mark.parametrize("what", REFUSED)
def test_says_what_it_cannot_do(what: str) -> None:
    """The op then calls grouped_mm and gated_activation_backward."""
    needs_kernel()
    T = {"no rows": 0, "few rows": 23}.get(what, 24)
    c = Case(68 if what == "H" else 64, 20 if what == "I" else 24, 3, T, bias=what == "bias")
    with simulated_gpu(folder(), 80 if what == "capability 8.0" else 90):
        t = make(c, torch.float32 if what == "float32" else torch.bfloat16)

        def shifted(x: Tensor) -> Tensor:
            wide = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype)[:, 1:]
            return wide.copy_(x)

        grad = shifted(t.grad) if what == "grad" else t.grad
        pre_act = torch.zeros(t.pre_act.numel() + 1, dtype=t.pre_act.dtype)[1:].view_as(t.pre_act) if what == "pre_act" else t.pre_act
        bias = shifted(t.bias) if what == "bias" else t.bias
        spec = replace(c.spec, gated=False) if what == "ungated" else c.spec
        status = fused.grouped_down_backward(
            grad, t.row_to_slot, c.K, t.offsets, t.down, bias, spec, pre_act, t.weights, torch.empty_like(t.pre_act),
            torch.empty(c.T * c.K, c.I, dtype=t.grad.dtype), torch.zeros(c.T * c.K),
        )  # fmt: skip
    assert status == "unsupported layout"


# ---- through the ops
ALL_FROZEN = Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS
WIDE = {"T": 256, "K": 2, "E": 8, "H": 72, "I": 136}
LAYER_CASES = {
    "_grouped_backward": {
        "all": backward_of(layer(**WIDE, bias=True, ids="dropped"), ALL_STACKED),
        "gpt_oss": backward_of(layer(**{**WIDE, **GPT_OSS}), ALL_STACKED),
        "frozen": backward_of(layer(**WIDE), ALL_FROZEN),
        "recompute": backward_of(layer(**WIDE), ALL_STACKED & ~Needs.GATE_UP_BIAS & ~Needs.DOWN_BIAS, recompute=True),
        "weights_only": backward_of(layer(**WIDE, bias=True), Needs.TOP_K_WEIGHTS),
    },
    "_grouped_backward.list": {"all": backward_of(layer(**WIDE, bias=True, ids="sparse"), ALL_LISTED, is_list=True)},
    "grouped_forward": {
        "default": layer(**WIDE),
        "gpt_oss": layer(**{**WIDE, **GPT_OSS}, ids="dropped"),
        "clamped_gelu": layer(**WIDE, activation="gelu", limit=0.5, bias=True),
    },
}


class LayerCase(TableCase):
    """A case of the table of this file, under the name of its op."""

    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        return LAYER_CASES[self.op][self.label](Maker(dtype, f"{self}/{draw}", integers))


@pytest.mark.parametrize("case", [LayerCase(op, label) for op, labels in LAYER_CASES.items() for label in labels], ids=str)
def test_through_the_layer(case: LayerCase) -> None:
    """The backward's op, and autograd of the whole layer."""
    needs_kernel()
    with simulated_gpu(folder(), 90) as gpu:
        check_error_rule(case, torch.bfloat16, "cpu")
        assert ran(gpu)


# ---- broken on purpose
KERNEL, SUM = "DownBackwardEpilogue", "slot_weights_kernel"
H, P = "halves", "interleaved"
MUTATIONS = [
    Mutation("ping-pong: turns not taken", 90, H, KERNEL, "mbarrier.try_wait", 1, "true"),
    Mutation("box: its copies not waited for", 90, H, KERNEL, "cp.async.wait_group", 4),
    Mutation("box: one group too few waited for", 90, H, KERNEL, "cp.async.wait_group", 2, " 1=> 2"),
    Mutation("box: a group of copies not counted", 90, H, KERNEL, "cp.async.commit_group", 3),
    Mutation("box: a copy dropped", 90, H, KERNEL, "cp.async.cg", 21),
    Mutation("box: refilled while TMA reads it", 90, H, KERNEL, "cp.async.bulk.wait_group.read", 1),
    Mutation("box: refilled while TMA reads it for the tile before", 90, H, KERNEL, "cp.async.bulk.wait_group.read", 0),
    Mutation("box: gate not read", 90, H, KERNEL, "ldmatrix", 2),
    Mutation("gradients: not put into the box", 90, H, KERNEL, "stmatrix", 3),
    Mutation("gradients: no fence before TMA", 90, H, KERNEL, "fence.proxy.async", 5),
    Mutation("gradients: not stored", 90, H, KERNEL, "cp.async.bulk.tensor.3d.global", 3),
    Mutation("scaled: not stored", 90, H, KERNEL, "cp.async.bulk.tensor.3d.global", 2),
    Mutation("stores: not counted", 90, H, KERNEL, "cp.async.bulk.commit_group", 1),
    Mutation("tail: not copied", 90, P, KERNEL, "st.global.v4", 0),
    Mutation("pairs: gradients not put into the box", 90, P, KERNEL, "st.shared.v2", 5),
    Mutation("row sum: a lane of the quad left out", 90, H, KERNEL, "shfl.sync.bfly", 1),
    Mutation("slot weights: half of the lanes left out", 90, H, SUM, "shfl.sync.bfly", 4),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutation_is_noticed(mutation: Mutation) -> None:
    needs_kernel()
    how = noticed(mutation, lambda: results(MODE_CASES[mutation.case]))
    assert how and "GPUSIM_MUTATE" not in how
    print(how)

"""grouped_up on a simulated H100: gather, gate and up projection and activation in one kernel, without the op around it.

What the kernel has no business with is NaN: rows of x that no slot refers to, weights and biases of experts without rows, rows
before and after the results. Everything the simulator checks is checked on the way.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moe_ext import reference
from moe_ext.experts import ExpertSpec
from moe_ext.testing import assert_accurate, simulated_gpu
from tests.gpusim import fused
from tests.gpusim.harness import folder, needs_nvcc
from tests.gpusim.mutations import Mutation, kernels_of_9_0
from tests.gpusim.orders import assert_same_bits_in_any_order, noticed
from tests.helpers import plain_ops

pytestmark = needs_nvcc
GUARD = 128  # rows around the results
LAYOUTS = ("halves", "interleaved", "transposed", "transposed_interleaved", "list", "list_transposed")


@dataclass(frozen=True)
class Case:
    """Shapes, routing (skewed: most slots to expert 1 of E; sparse: empty experts; dropped: some slots to nobody), layout."""

    H: int
    I: int  # noqa: E741
    E: int
    T: int
    K: int = 2
    ids: str = "random"
    layout: str = "halves"
    bias: bool = False
    activation: str = "silu"
    limit: float | None = None

    def __str__(self) -> str:
        name = f"H{self.H}_I{self.I}_E{self.E}_T{self.T}_{self.ids}_{self.layout}"
        return name + ("_bias" if self.bias else "") + ("" if self.activation == "silu" else "_" + self.activation)

    @property
    def spec(self) -> ExpertSpec:
        alpha = 1.702 if self.activation == "swigluoai" else None
        transposed, interleaved = "transposed" in self.layout, "interleaved" in self.layout
        return ExpertSpec(self.activation, transposed=transposed, interleaved=interleaved, alpha=alpha, limit=self.limit)

    def routing(self, random: torch.Generator) -> Tensor:
        shape = (self.T, self.K)
        if self.ids == "one":
            return torch.full(shape, self.E // 2)
        if self.ids == "dropped":
            return torch.randint(-2, self.E + 2, shape, generator=random)
        if self.ids == "sparse":
            return torch.randint(0, (self.E + 2) // 3, shape, generator=random) * 3
        ids = torch.randint(0, self.E, shape, generator=random)
        return ids.where(torch.rand(shape, generator=random) < 0.3, 1 % self.E) if self.ids == "skewed" else ids


# Tails in every direction, experts without rows and with one, more row tiles than one, more experts than a warp has lanes.
PINGPONG = [
    Case(64, 64, 3, 20),
    Case(256, 192, 8, 150, ids="skewed"),
    Case(328, 136, 8, 100, ids="sparse"),
    Case(264, 360, 8, 60, ids="dropped"),
    Case(72, 8, 130, 90, ids="skewed"),
    Case(320, 128, 5, 1, K=1),
    Case(136, 128, 40, 9, ids="dropped"),
    Case(72, 360, 3, 120, ids="dropped"),  # tiles of dropped rows between others
]
COOPERATIVE = [
    Case(328, 136, 2, 300, ids="skewed"),
    Case(128, 256, 1, 130, ids="one"),  # a block of a cluster has no rows
    Case(72, 360, 3, 500, ids="dropped"),
    Case(192, 128, 4, 640, ids="sparse"),
]
LAYOUT_CASES = [
    replace(c, layout=layout, bias=bias)
    for layout in LAYOUTS
    for c, bias in ((PINGPONG[3], False), (PINGPONG[2], True), (COOPERATIVE[0], True), (COOPERATIVE[2], False))
]
ACTIVATIONS = [
    replace(PINGPONG[1], I=136, T=60, activation=activation, limit=limit, layout=layout)
    for activation, limit in (("gelu", None), ("gelu_tanh", None), ("relu", 0.7), ("relu2", None), ("swigluoai", 0.8), ("silu", 0.5))
    for layout in ("halves", "transposed_interleaved")
]
MODE_CASES = {
    "pingpong": PINGPONG[1],
    "cooperative": COOPERATIVE[0],
    "adjacent": replace(PINGPONG[3], layout="transposed_interleaved", bias=True),
    "list": replace(PINGPONG[2], layout="list"),
}


@dataclass
class Inputs:
    """gate and up are E x (I, H), as views of whatever the layout keeps them in."""

    x: Tensor
    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    gate: Tensor | list[Tensor]
    up: Tensor | list[Tensor]
    bias: tuple[Tensor, Tensor] | None


def split(stack: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up of a stack, as views."""
    if not interleaved:
        gate, up = stack.chunk(2, dim)
        return gate, up
    halves = stack.unflatten(dim, (-1, 2))
    return halves.select(dim + 1, 0), halves.select(dim + 1, 1)


def make(c: Case, dtype: torch.dtype, integers: bool = False) -> Inputs:
    random = torch.Generator().manual_seed(zlib.crc32(str(c).encode()))

    def floats(*shape: int, fan_in: int = 1) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=random).to(dtype)
        return (torch.randn(shape, generator=random) / fan_in**0.5).to(dtype)

    ids = c.routing(random)
    offsets, row_to_slot, slot_to_row = plain_ops.sort_by_expert(ids, c.E)
    x = floats(c.T, c.H)
    x[((ids < 0) | (ids >= c.E)).all(1)] = float("nan")
    spec, used = c.spec, (offsets.diff() > 0)[:, None, None]
    stack = floats(c.E, *((c.H, 2 * c.I) if spec.transposed else (2 * c.I, c.H)), fan_in=c.H)
    stack = stack.where(used, float("nan")).contiguous()
    gate, up = split(stack, 2 if spec.transposed else 1, spec.interleaved)
    if spec.transposed:
        gate, up = gate.mT, up.mT
    if c.layout.startswith("list"):
        kept = [[(w.mT.contiguous().mT if spec.transposed else w.contiguous()) for w in half] for half in (gate, up)]
        gate, up = kept
    bias = split(floats(c.E, 2 * c.I).where(used[:, :, 0], float("nan")), 1, spec.interleaved) if c.bias else None
    return Inputs(x, offsets, row_to_slot, slot_to_row, gate, up, bias)


def guarded(S: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    whole = torch.full((S + 2 * GUARD, width), float("nan"), dtype=dtype)
    return whole, whole[GUARD:-GUARD]


def run_kernel(c: Case, i: Inputs, train: bool = True) -> tuple[Tensor, Tensor | None]:
    S, dtype = c.T * c.K, i.x.dtype
    whole, out = guarded(S, c.I, dtype)
    whole_pre, pre_act = guarded(S, 2 * c.I, dtype) if train else (None, None)
    bias = i.bias
    if bias and c.layout.startswith("list"):
        bias = tuple([b.clone() for b in half] for half in bias)
    status = fused.grouped_up(i.x, i.row_to_slot, c.K, i.offsets, (i.gate, i.up), bias, c.spec, pre_act, out)
    if status != "ok":
        raise RuntimeError(status)  # simulated_gpu() has the simulator's words
    for w in (whole, whole_pre):
        if w is not None:
            assert w[:GUARD].isnan().all() and w[-GUARD:].isnan().all(), "rows around the results were written"
    return out, pre_act


def expected(c: Case, i: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activation and pre-activation of the composed path in plain PyTorch."""
    rows = plain_ops.permute(i.x.to(dtype), i.row_to_slot, i.slot_to_row, c.K)
    parts = []
    for k, weight in enumerate((i.gate, i.up)):
        bias = None if i.bias is None else i.bias[k].to(dtype)
        parts.append(plain_ops.grouped_mm(rows, [w.to(dtype) for w in weight], i.offsets, bias))
    pre_act = torch.stack(parts, -1).flatten(1) if c.spec.interleaved else torch.cat(parts, -1)
    used = (torch.arange(len(rows)) < i.offsets[-1])[:, None]
    return reference.activation(pre_act, c.spec).where(used, 0), pre_act


def check(c: Case, dtype: torch.dtype, train: bool = True) -> None:
    with simulated_gpu(folder(), 90) as gpu:
        i = make(c, dtype)
        new = run_kernel(c, i, train)
        assert any("gathered_gemm" in launch["kernel"] for launch in gpu.take_launches())
    for n, p, t, what in zip(new, expected(c, i, dtype), expected(c, i, torch.float64), ("out", "pre_act"), strict=True):
        if n is not None:
            assert_accurate(n, p, t, what)


def needs_kernel() -> None:
    if not kernels_of_9_0():
        pytest.skip("CUTLASS is not installed, so the library has no kernels of sm_90a")


@pytest.mark.parametrize("case", [*PINGPONG, *COOPERATIVE], ids=str)
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


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_same_bits_as_the_activation_by_itself(case: Case) -> None:
    """What training saves is what the output was computed from."""
    needs_kernel()
    with simulated_gpu(folder(), 90):
        i = make(case, torch.bfloat16)
        out, pre_act = run_kernel(case, i)
        spec, used = case.spec, int(i.offsets[-1])
        options = {"interleaved": spec.interleaved, "alpha": spec.alpha, "limit": spec.limit}
        assert torch.equal(out[:used], torch.ops.moe_ext.gated_activation(pre_act[:used].clone(), activation=spec.activation, **options))


@pytest.mark.parametrize("case", [PINGPONG[2], COOPERATIVE[0], LAYOUT_CASES[4]], ids=str)
def test_without_pre_activation(case: Case) -> None:
    """Inference writes less and computes the same."""
    needs_kernel()
    with simulated_gpu(folder(), 90):
        i = make(case, torch.bfloat16)
        assert torch.equal(run_kernel(case, i, train=False)[0], run_kernel(case, i)[0])


@pytest.mark.parametrize(
    "case", [replace(c, activation="relu", bias=True) for c in (PINGPONG[3], COOPERATIVE[2], LAYOUT_CASES[12])], ids=str
)
def test_whole_numbers_are_exact(case: Case) -> None:
    needs_kernel()
    with simulated_gpu(folder(), 90):
        i = make(case, torch.float16, integers=True)
        new = run_kernel(case, i)
    for n, t in zip(new, expected(case, i, torch.float64), strict=True):
        assert torch.equal(n.double(), t.half().double())


def test_every_kernel_runs() -> None:
    """Both element types, both tiles, each layout: the list of kernels in the library against the list of those that ran."""
    needs_kernel()
    with simulated_gpu(folder(), 90) as gpu:
        for layout in LAYOUTS[:5]:
            for dtype in (torch.bfloat16, torch.float16):
                for T, E in ((10, 3), (140, 1)):
                    c = Case(64, 72, E, T, layout=layout)
                    run_kernel(c, make(c, dtype))
        seen = {launch["kernel"] for launch in gpu.take_launches()}
        missing = {n for n in gpu.kernels() if "grouped_up_sm90" in n or "tensor_maps_sm90" in n} - seen
    assert not missing, "\n".join(sorted(missing))


REFUSED = {
    "float32": "unsupported dtype",
    "H": "unsupported layout",
    "I": "unsupported layout",
    "no rows": "unsupported layout",
    "x": "unsupported layout",
    "one bias": "unsupported layout",
    "pre_act in pairs": "unsupported layout",
    "capability 8.0": "unsupported layout",
}


@pytest.mark.parametrize("what", REFUSED)
def test_says_what_it_cannot_do(what: str) -> None:
    """The op then calls grouped_mm and gated_activation."""
    needs_kernel()
    c = Case(68 if what == "H" else 64, 20 if what == "I" else 24, 3, 0 if what == "no rows" else 5, bias=what == "one bias")
    with simulated_gpu(folder(), 80 if what == "capability 8.0" else 90):
        i = make(c, torch.float32 if what == "float32" else torch.bfloat16)
        x = torch.zeros(5, 65, dtype=i.x.dtype)[:, 1:] if what == "x" else i.x
        bias = (i.bias[0], None) if i.bias else None
        spec = replace(c.spec, interleaved=what == "pre_act in pairs")
        out = torch.empty(c.T * c.K, c.I, dtype=x.dtype)
        assert fused.grouped_up(x, i.row_to_slot, c.K, i.offsets, (i.gate, i.up), bias, spec, None, out) == REFUSED[what]


def results(c: Case) -> tuple[Tensor, ...]:
    out, pre_act = run_kernel(c, make(c, torch.bfloat16))
    assert pre_act is not None
    return out, pre_act


@pytest.mark.parametrize("name", MODE_CASES)
def test_any_order_of_events(name: str) -> None:
    needs_kernel()
    assert_same_bits_in_any_order(lambda: results(MODE_CASES[name]))


PINGPONG_KERNEL, COOPERATIVE_KERNEL, STORE = "GatheredTileILi64", "GatheredTileILi128", "cp.async.bulk.tensor.3d.global"
P = "pingpong"
MUTATIONS = [
    Mutation("ring: stage filled while it is read", 90, P, PINGPONG_KERNEL, "mbarrier.try_wait", 2, "true"),
    Mutation("ring: stage read before it is filled", 90, P, PINGPONG_KERNEL, "mbarrier.try_wait", 1, "true"),
    Mutation("ring: stage released before its products are done", 90, P, PINGPONG_KERNEL, "wgmma.wait_group", 0, " 1=> 7"),
    Mutation("ring: the copies' arrival does not wait for them", 90, P, PINGPONG_KERNEL, "noinc", 0,
             "cp.async.mbarrier.arrive.noinc.shared::cta.b64 =>mbarrier.arrive.shared::cta.b64 _, "),
    Mutation("ring: bytes of the boxes not announced", 90, P, PINGPONG_KERNEL, "expect_tx"),
    Mutation("ping-pong: turns not taken", 90, P, PINGPONG_KERNEL, "mbarrier.try_wait", 0, "true"),
    Mutation("a product dropped", 90, P, PINGPONG_KERNEL, "wgmma.mma_async", 2),
    Mutation("accumulators read before the last products are done", 90, P, PINGPONG_KERNEL, "wgmma.wait_group", 1),
    Mutation("a copy of rows dropped", 90, P, PINGPONG_KERNEL, "cp.async.cg", 3),
    Mutation("store: no fence between stmatrix and TMA", 90, P, PINGPONG_KERNEL, "fence.proxy.async", 1),
    Mutation("store: other lanes not waited for", 90, P, PINGPONG_KERNEL, "bar.warp.sync", 1),
    Mutation("store: box overwritten while TMA reads it", 90, P, PINGPONG_KERNEL, "cp.async.bulk.wait_group.read", 2),
    Mutation("store: stores not counted", 90, P, PINGPONG_KERNEL, "cp.async.bulk.commit_group", 1),
    Mutation("store: TMA store dropped", 90, P, PINGPONG_KERNEL, STORE, 2),
    Mutation("cluster: stage filled while the other CTA reads it", 90, "cooperative", COOPERATIVE_KERNEL, "mbarrier.try_wait", 1, "true"),
    Mutation("list: address of a matrix not replaced", 90, "list", "list_kernel", "tensormap.replace"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutation_is_noticed(mutation: Mutation) -> None:
    needs_kernel()
    how = noticed(mutation, lambda: results(MODE_CASES[mutation.case]))
    assert how and "GPUSIM_MUTATE" not in how

"""Blocks that `enable` has to take: found whatever the sizes, names and modes are, proven whatever the chance, and wrong ones still not."""

from __future__ import annotations

import copy
import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ext
from benchmarks.proof_verdicts import SPECS, WRONG, prove, right, weights_of
from moe_ext.prove.rule import DRAWS, Runs, judge_draws
from tests.helpers.models import assert_as
from tests.integrations.own_blocks import E, H, I
from tests.integrations.test_enable_changes_nothing import MLP, ListBlock, Stack

pytestmark = pytest.mark.tf4
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SPECS)
def test_T113_right_blocks_are_proven_and_wrong_ones_are_not(name: str, dtype: str) -> None:
    spec = SPECS[name]
    for seed in range(3):
        weights = weights_of(spec, HALF[dtype], seed)
        proof, _ = prove(right, spec, weights, seed)
        assert proof.reason is None, proof.reason
        for kind, (block, differs) in WRONG.items():
            if differs(spec):
                reason = prove(block, spec, weights, seed)[0].reason
                assert reason is not None and "formula is another" in reason, kind


def _runs(error: float, count: int) -> Any:
    """Draws of results whose error is so many times that of plain PyTorch, in few numbers."""

    def draw(number: int) -> Runs:
        generator = torch.Generator().manual_seed(number)
        truth, plain, new = torch.randn(3, count, generator=generator, dtype=torch.float64)
        drawn.append(number)
        results = [{"output": (truth + scale * 0.01 * noise).float()} for scale, noise in ((error, new), (1.0, plain))]
        return Runs({}, results[0], results[1], {"output": truth})

    drawn: list[int] = []
    return draw, drawn


def test_T113_a_miss_by_chance_is_decided_by_more_draws() -> None:
    draw, drawn = _runs(1.6, 4)
    first = next(n for n in itertools.count() if not _obeys(draw(n)))
    drawn.clear()
    proof = judge_draws(lambda n: draw(n + first), terms=1)
    assert proof.reason is None and 1 < len(drawn) <= DRAWS


def test_T113_an_error_that_is_too_large_is_refused_after_all_draws_and_a_clear_one_at_once() -> None:
    draw, drawn = _runs(4.0, 400)
    assert judge_draws(draw, terms=1).reason is not None and len(drawn) == DRAWS
    draw, drawn = _runs(1000.0, 4)
    assert judge_draws(draw, terms=1).reason is not None and len(drawn) == 1


def _obeys(runs: Runs) -> bool:
    error = [(r["output"].double() - runs.truth["output"]).norm() for r in (runs.new, runs.plain)]
    return bool(error[0] <= 2 * error[1])


class Reshapes(nn.Module):
    """A block that knows its hidden size, around a stack or a list."""

    def __init__(self, kind: str, hidden: int, inner: int) -> None:
        super().__init__()
        self.hidden_dim, self.gate = hidden, nn.Linear(hidden, E, bias=False)
        self.experts: Any = Stack() if kind == "stack" else nn.ModuleList(MLP() for _ in range(E))
        if kind == "stack":
            self.experts.w13 = nn.Parameter(torch.randn(E, 2 * inner, hidden) * 0.2)
            self.experts.w2 = nn.Parameter(torch.randn(E, hidden, inner) * 0.2)
        else:
            for expert in self.experts:
                expert.gate_proj, expert.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
                expert.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.hidden_dim)
        weights, index = self.gate(rows).softmax(-1).topk(2)
        if isinstance(self.experts, Stack):
            return self.experts(rows, index, weights).reshape(x.shape)
        out = torch.zeros_like(rows)
        for e in range(E):
            row, slot = torch.where(index == e)
            out.index_add_(0, row, self.experts[e](rows[row]) * weights[row, slot, None])
        return out.reshape(x.shape)


@pytest.mark.parametrize(("hidden", "inner"), [(32, 24), (32, 16), (24, 48), (16, 64)])
@pytest.mark.parametrize("kind", ["stack", "list"])
def test_T114_every_hidden_size_that_the_shapes_allow_is_tried(kind: str, hidden: int, inner: int) -> None:
    model, x = nn.Sequential(Reshapes(kind, hidden, inner)), torch.randn(3, 5, hidden)
    plain = copy.deepcopy(model)
    assert moe_ext.enable(model, strict=True).enabled_count == 1
    assert_as(model(x), plain, x)


@pytest.mark.parametrize("kind", ["stack", "list"])
def test_T115_a_model_made_in_inference_mode(kind: str) -> None:
    with torch.inference_mode():
        model, x = nn.Sequential(Reshapes(kind, H, I)), torch.randn(3, 5, H)
        plain = copy.deepcopy(model)
        assert moe_ext.enable(model, strict=True).enabled_count == 1
        assert_as(model(x), plain, x)
    assert all(p.is_inference() for p in model.parameters())


class OtherName(nn.Module):
    """Its methods do not call their first parameter `self`."""

    def __init__(this) -> None:  # noqa: N805
        super().__init__()
        this.gate, this.experts = nn.Linear(H, E, bias=False), nn.ModuleList(MLP() for _ in range(E))

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        rows = x.reshape(-1, H)
        weights, index = this.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for e in range(E):
            row, slot = torch.where(index == e)
            out.index_add_(0, row, this.experts[e](rows[row]) * weights[row, slot, None])
        return out.reshape(x.shape)


class Shadows(OtherName):
    """A name inside of its forward hides that of its first parameter."""

    def forward(s, x: Tensor) -> Tensor:  # noqa: N805
        rows = x.reshape(-1, H)
        weights, index = (lambda s: s.softmax(-1).topk(2))(s.gate(rows))
        out = torch.zeros_like(rows)
        for e in range(E):
            row, slot = torch.where(index == e)
            out.index_add_(0, row, s.experts[e](rows[row]) * weights[row, slot, None])
        return out.reshape(x.shape)


def test_T116_the_first_parameter_of_a_method_has_any_name() -> None:
    model, x = nn.Sequential(OtherName()), torch.randn(2, 9, H)
    plain = copy.deepcopy(model)
    assert moe_ext.enable(model, strict=True).enabled_count == 1
    assert_as(model(x), plain, x)
    assert "uses the name 's' of its first parameter" in (moe_ext.enable(nn.Sequential(Shadows())).blocks[0].reason or "")


def test_T117_experts_in_8_bit_are_refused_for_what_they_are() -> None:
    module = types.ModuleType("bitsandbytes.nn.pretended")
    sys.modules[module.__name__] = module
    try:
        kind = type("Linear8bitLt", (nn.Linear,), {"__module__": module.__name__})
        model = nn.Sequential(ListBlock(nn.Linear(H, E, bias=False)))
        for expert in model[0].experts:
            expert.up_proj = kind(H, I, bias=False)
        with pytest.raises(moe_ext.NoExpertsFound, match=r"experts.0.up_proj is a Linear8bitLt of bitsandbytes"):
            moe_ext.enable(model)
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize("kind", ["list", "stack"])
def test_T118_a_reason_that_may_pass_is_a_report(kind: str) -> None:
    """As with offloading, which puts a forward of its own on every part, or with weights that are elsewhere."""
    model = nn.Sequential(Reshapes(kind, H, I))
    part = model[0].experts if kind == "stack" else model[0].experts[1].up_proj
    own, part.forward = part.forward, lambda *args: F.relu(own(*args))
    report = moe_ext.enable(model)
    assert report.enabled_count == 0 and "forward" in (report.blocks[0].reason or "")
    del part.forward
    assert moe_ext.enable(model, strict=True).enabled_count == 1


def test_T118_sharded_away_weights_are_a_report() -> None:
    model = nn.Sequential(Reshapes("stack", H, I))
    whole = [p.data for p in model[0].experts.parameters()]
    for p in model[0].experts.parameters():
        p.data = p.data[:0]
    try:
        report = moe_ext.enable(model)
        assert report.enabled_count == 0
    finally:
        for p, data in zip(model[0].experts.parameters(), whole, strict=True):
            p.data = data
    assert moe_ext.enable(model, strict=True).enabled_count == 1

"""Blocks that look like the others and compute, or do, something else: each must be left alone, with a reason.

The differences are where few tokens do not show them: in one of many experts, behind a condition, in what is kept besides the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import H, I, K, experts, stacks
from . import odd_loops as odd
from .lists import Block
from .odd_loops import MANY, RARE


@dataclass(frozen=True)
class Refused:
    """reason: a pattern of what the report has to say."""

    name: str
    build: Callable[[], nn.Module]
    reason: str


# ------------------------------------------------------------------------------------------------------- one expert is not like others
class Acted(experts.Numbered):
    """Its activation is under a name of its own."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.nonlinearity: Any = nn.SiLU()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.nonlinearity(self.w1(x)) * self.w3(x)) * self.scale


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _with(change: Callable[[Any], None], expert: Any = Acted) -> Callable[[], nn.Module]:
    """A block of many experts, of which the rare one is changed."""

    def build() -> nn.Module:
        block = Block(expert, count=MANY)
        change(block.experts[RARE])
        return block

    return build


def _other_class(block: Any) -> None:
    block.__class__ = experts.NumberedOtherwise


def _wider(expert: Any) -> None:
    expert.gate_proj, expert.up_proj, expert.down_proj = nn.Linear(H, 2 * I), nn.Linear(H, 2 * I), nn.Linear(2 * I, H)


def _other_linear(expert: Any) -> None:
    expert.w2.__class__ = Doubled


class Dropping(experts.Gated):
    """Drops out between its projections, by the function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training))


class DroppingModule(experts.Gated):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Cosine(experts.Gated):
    """An activation that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.cos(self.gate_proj(x)) * self.up_proj(x))


class Scaled(experts.Gated):
    """A parameter of its own beside the projections."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.scale = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Normed(experts.Gated):
    """Normalises between its projections, without a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(a / a.norm(dim=-1, keepdim=True).clamp(min=1e-6))


class NormedModule(experts.Gated):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.norm = nn.LayerNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Clamped(experts.Gated):
    """Clamps what ordinary tokens never reach."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class Counting(experts.Gated):
    """Counts its tokens."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


# ------------------------------------------------------------------------------------------------------------------------- stacks
class RareScale(stacks.Stack):
    """One of many experts is scaled, by a number in the code."""

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return super().mlp(e, x) * (1.5 if e == RARE else 1.0)


class ScaleBuffer(stacks.Stack):
    """A scale for each expert in a buffer, one to begin with and for the experts a proof is likely to look at."""

    def make(self) -> None:
        super().make()
        scale = torch.ones(self.num_experts)
        scale[RARE] = 1.5
        self.register_buffer("scale", scale)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return super().mlp(e, x) * self.scale[e]


class ShiftedIds(stacks.Stack):
    """Ids begin at one."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return self.mixed(x, (index + 1) % self.num_experts, weights)


class StackLoad(stacks.Stack):
    """Keeps the load in a buffer."""

    def make(self) -> None:
        super().make()
        self.register_buffer("load", torch.zeros(self.num_experts))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        self.load += index.flatten().bincount(minlength=self.num_experts)
        return self.mixed(x, index, weights)


class Weighted(stacks.Stack):
    """The weights on the input."""

    def mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows, slots = torch.where(index == e)
            out.index_add_(0, rows, self.mlp(e, x[rows] * weights[rows, slots, None]))
        return out


def _stack(kind: type[stacks.Stack], call: str = "x index weights", count: int = MANY) -> Callable[[], nn.Module]:
    return lambda: stacks.Whole(kind, call, count=count)


OTHER = "formula is another than the one detected"
ANY = r"\w+ \w+ \w+"  # a sentence
CASES = [
    Refused("another class", _with(_other_class), "alike"),
    Refused("another width", _with(_wider, experts.Gated), f"experts.{RARE} differs in shapes"),
    Refused("another activation", _with(lambda e: setattr(e, "nonlinearity", nn.ReLU())), ANY),
    Refused("another act_fn", _with(lambda e: setattr(e, "act_fn", nn.ReLU()), experts.Gated), "act"),
    Refused("another scale", _with(lambda e: setattr(e, "scale", 1.5)), ANY),
    Refused("another kind of linear layer", _with(_other_linear), ANY),
    Refused("dropout function", lambda: Block(Dropping), OTHER),
    Refused("dropout module", lambda: Block(DroppingModule), "drops out with p=0.1"),
    Refused("unknown activation", lambda: Block(Cosine), OTHER),
    Refused("parameter of its own", lambda: Block(Scaled), "alike MLPs"),
    Refused("norm", lambda: Block(Normed), OTHER),
    Refused("norm module", lambda: Block(NormedModule), "alike MLPs"),
    Refused("clamped result", lambda: Block(Clamped), ANY),
    Refused("experts that count", lambda: Block(Counting), ANY),
    *(Refused(f"loop {kind.__name__}", kind, ANY) for kind in (odd.Skips, odd.Stops, odd.Short, odd.Permuted)),
    *(Refused(f"loop {kind.__name__}", kind, OTHER) for kind in (odd.Capacity, odd.SmallCapacity, odd.WeightBefore, odd.Squared)),
    *(Refused(f"loop {kind.__name__}", kind, ANY) for kind in (odd.ScaledOutside, odd.CountsTokens, odd.KeepsOutputs)),
    *(Refused(f"loop {kind.__name__}", kind, OTHER) for kind in (odd.Feeds, odd.ReadsLoop)),
    *(Refused(f"loop {kind.__name__}", kind, ANY) for kind in (odd.Private, odd.Soft)),
    Refused("comprehension", odd.Comprehension, "no loop over its experts"),
    Refused("loop without result", odd.Sorted, ANY),
    Refused("closure", odd.closure, r"variables around it \(factor\)"),
    Refused("super()", odd.Super, "variables around it"),
    Refused("decorated", odd.Decorated, "wrapped"),
    Refused("without source", odd.without_source, "source of its forward is not available"),
    Refused("stack, one scaled in code", _stack(RareScale), ANY),
    Refused("stack, one scaled by a buffer", _stack(ScaleBuffer), ANY),
    Refused("stack, ids from one", _stack(ShiftedIds), ANY),
    Refused("stack, load in a buffer", _stack(StackLoad), ANY),
    Refused("stack, weights on the input", _stack(Weighted), ANY),
    Refused("stack, up before gate", _stack(stacks.UpFirst), OTHER),
    Refused("stack, scores alone", _stack(stacks.DenseAlone, "x dense"), ANY),
]
# K is that of `Block`; named here, since the proofs above depend on there being many more experts than that.
assert MANY > 10 * K

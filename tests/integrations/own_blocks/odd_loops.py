"""Blocks with one module per expert whose loop does something else, or more, than adding what the experts give.

The differences are where few tokens do not show them: in one of many experts, or in what is kept besides the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lists import Block

MANY = 48
RARE = 29  # the one expert of many that differs


class _Loop(Block):
    """`before` and `after` an expert are what the classes below do more."""

    def __init__(self, count: int = MANY) -> None:
        super().__init__(count=count)

    def routed(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        return x, index, weights, torch.zeros_like(x)


class Skips(_Loop):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            if i == RARE:
                continue
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Stops(_Loop):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            if i > RARE:
                break
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Short(_Loop):
    """Leaves the last expert out."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i in range(self.num_experts - 1):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, self.experts[i](x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Permuted(_Loop):
    """Exchanges two of many experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i in range(self.num_experts):
            rows, slots = torch.where(index == i)
            expert = self.experts[{RARE: RARE + 1, RARE + 1: RARE}.get(i, i)]
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Capacity(_Loop):
    """Drops what is more than each expert's room, a share of the tokens."""

    def room(self, tokens: int) -> int:
        return max(1, int(1.25 * tokens * self.top_k / self.num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            rows, slots = rows[: self.room(len(x))], slots[: self.room(len(x))]
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class SmallCapacity(Capacity):
    """Room for three tokens, however many there are."""

    def room(self, tokens: int) -> int:
        return 3


class WeightBefore(_Loop):
    """Multiplies the weights on the input of the experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows] * weights[rows, slots, None]))
        return out.view_as(hidden_states)


class Squared(_Loop):
    """Multiplies the weights twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None] ** 2)
        return out.view_as(hidden_states)


class ScaledOutside(_Loop):
    """A scale for each expert, in the block, not trained and one to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_scale = nn.Parameter(torch.ones(MANY), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None] * self.expert_scale[i])
        return out.view_as(hidden_states)


class CountsTokens(_Loop):
    """Keeps the load of each expert, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(MANY))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            self.load[i] += len(rows)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class KeepsOutputs(_Loop):
    """Keeps what each expert gave, in an attribute that a loss reads later."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        self.last_outputs: list[Tensor] = []
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            y = expert(x[rows])
            self.last_outputs.append(y)
            out.index_add_(0, rows, y * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Feeds(_Loop):
    """Each expert sees what those before it have added."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows] + 0.1 * out[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class ReadsLoop(_Loop):
    """Returns a value that the loop made beside the hidden states."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x, index, weights, out = self.routed(hidden_states)
        penalty = torch.zeros((), dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            y = expert(x[rows])
            penalty = penalty + y.square().sum()
            out.index_add_(0, rows, y * weights[rows, slots, None])
        return out.view_as(hidden_states), penalty


class Private(_Loop):
    """Reads an attribute whose name a class body changes."""

    def __init__(self) -> None:
        super().__init__()
        self.__factor = 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states) * self.__factor


class Soft(_Loop):
    """Every expert counts, weighted by the softmax itself: there is no index."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores = self.gate(hidden_states).softmax(dim=-1)
        out = torch.zeros_like(hidden_states)
        for i in range(len(self.experts)):
            out = out + self.experts[i](hidden_states) * scores[..., i].unsqueeze(-1)
        return out


class Comprehension(_Loop):
    """No loop, a comprehension."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, _ = self.routed(hidden_states)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = every.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[1]))
        return (chosen * weights.unsqueeze(-1)).sum(1).view_as(hidden_states)


class Sorted(_Loop):
    """The loop makes a list of parts, and no hidden states."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, _ = self.routed(hidden_states)
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=self.num_experts).tolist()
        parts, start = [], 0
        for i, expert in enumerate(self.experts):
            parts.append(expert(x[order[start : start + counts[i]] // self.top_k]))
            start += counts[i]
        y = torch.empty(index.numel(), x.shape[1], dtype=x.dtype).index_copy(0, order, torch.cat(parts))
        return (y.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view_as(hidden_states)


def closure() -> nn.Module:
    factor = 1.0

    class Closed(_Loop):
        def forward(self, hidden_states: Tensor) -> Tensor:
            x, index, weights, out = self.routed(hidden_states)
            for i, expert in enumerate(self.experts):
                rows, slots = torch.where(index == i)
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
            return factor * out.view_as(hidden_states)

    return Closed()


class Super(Block):
    """The loop is behind `super()`, which needs a variable around the method."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out, _ = super().forward(hidden_states)
        return out


class Decorated(_Loop):
    @torch.autocast("cpu", enabled=False)
    def forward(self, hidden_states: Tensor) -> Tensor:
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


def without_source() -> nn.Module:
    code = """
class Hidden(Loop):
    def forward(self, hidden_states):
        x, index, weights, out = self.routed(hidden_states)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)
"""
    names: dict[str, Any] = {"torch": torch, "Loop": _Loop, "__name__": "nowhere"}
    exec(code, names)  # noqa: S102  (a class without a file)
    return names["Hidden"]()

"""Blocks with one module per expert: the ways to loop over them, to name them and to return."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Case, E, H, I, K, experts


class Block(nn.Module):
    """Softmax router with top-k; the classes below differ in the loop. Its own is the one over masks and `index_add_`."""

    renormalise = True

    def __init__(
        self, expert: Any = experts.Gated, count: int = E, hidden: int = H, inner: int = I, top_k: int = K, name: str = "experts"
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = count, top_k
        self.gate = nn.Linear(hidden, count, bias=False)
        setattr(self, name, nn.ModuleList(expert(hidden, inner) for _ in range(count)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        weights, index = F.softmax(logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return index, weights.to(x.dtype), logits

    def forward(self, hidden_states: Tensor) -> Any:
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        index, weights, logits = self.route(hidden_states)
        final = torch.zeros_like(hidden_states)
        mask = F.one_hot(index, num_classes=self.num_experts).permute(2, 1, 0)
        for i in range(self.num_experts):
            expert = self.experts[i]
            slot, token = torch.where(mask[i])
            final.index_add_(0, token, expert(hidden_states[None, token].reshape(-1, shape[-1])) * weights[token, slot, None])
        return final.reshape(shape), logits


class NotRenormalised(Block):
    renormalise = False


class OnlyHit(Block):
    """Goes through the experts that have tokens, and adds to a flat result with `+=`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i in index.unique().tolist():
            rows, slots = (index == i).nonzero(as_tuple=True)
            out[rows] += weights[rows, slots, None] * self.experts[i](x[rows])
        return out.view_as(hidden_states)


class Enumerated(Block):
    """`enumerate`, an early `continue`, boolean masks, and a shared expert behind a gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = experts.Gated(H, 2 * I)
        self.shared_expert_gate = nn.Linear(H, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        x = hidden_states.view(-1, width)
        index, weights, logits = self.route(x)
        results = torch.zeros((batch * length, width), dtype=x.dtype, device=x.device)
        for number, layer in enumerate(self.experts):
            chosen = index == number
            rows = chosen.any(dim=-1)
            if not rows.any():
                continue
            results[rows] += layer(x[rows]) * (weights * chosen).sum(dim=-1, keepdim=True)[rows]
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return (results + shared).view(batch, length, width), logits


class EveryExpertOnEveryToken(Block):
    """Weights of all experts, zero where an expert is not chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        index, weights, _ = self.route(hidden_states)
        scores = torch.zeros(*hidden_states.shape[:-1], self.num_experts, dtype=weights.dtype).scatter(-1, index, weights)
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self.experts):
            out = out + scores[..., i : i + 1] * expert(hidden_states)
        return out


class Named(nn.Module):
    """Experts in a `ModuleDict` by their number as text."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleDict({str(i): experts.Numbered(H, I) for i in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, chosen = torch.topk(self.router(flat), K, dim=-1)
        scores = scores.softmax(dim=-1)
        y = flat.new_zeros(flat.shape)
        for e in range(len(self.experts)):
            at, slot = torch.where(chosen == e)
            y = y.index_add(0, at, self.experts[str(e)](flat[at]) * scores[at, slot].unsqueeze(1))
        return y.reshape(x.shape)


class NamedItems(Named):
    """Goes through `items()`."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, chosen = torch.topk(self.router(flat), K, dim=-1)
        scores = scores.softmax(dim=-1)
        y = torch.zeros_like(flat)
        for name, expert in self.experts.items():
            at, slot = torch.where(chosen == int(name))
            if at.numel() > 0:
                y[at] = y[at] + expert(flat[at]) * scores[at, slot].unsqueeze(1)
        return y.reshape(x.shape)


class Mlps(Block):
    """Another name for the list."""

    def __init__(self) -> None:
        super().__init__(name="mlps")

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i, mlp in enumerate(self.mlps):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, mlp(x[rows]) * weights[rows, slots].unsqueeze(-1))
        return out.reshape(hidden_states.shape)


class Ffns(Block):
    """Another name, the slots of a token in an outer loop over the top-k."""

    def __init__(self) -> None:
        super().__init__(name="ffns")

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for slot in range(self.top_k):
            for i, ffn in enumerate(self.ffns):
                rows = (index[:, slot] == i).nonzero().squeeze(-1)
                if len(rows):
                    out[rows] += weights[rows, slot].unsqueeze(-1) * ffn(x[rows])
        return out.reshape(hidden_states.shape)


class InAMethod(Block):
    """The loop is in a method that is given the routing, in an order of its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        return self.mix(weights, x, ids=index).view(hidden_states.shape)

    def mix(self, scale: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            at, slot = torch.where(ids == i)
            out.index_add_(0, at, expert(rows[at]) * scale[at, slot, None])
        return out


class InFloat32(Block):
    """Accumulates in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.size(-1))
        probabilities = self.gate(x).float().softmax(-1)
        weights, index = probabilities.topk(self.top_k)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]).float() * weights[rows, slots, None])
        return out.to(x.dtype).reshape(hidden_states.shape)


class Dictionary(Block):
    """Returns a dict."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, logits = self.route(x)
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, self.experts[i](x[rows]) * weights[rows, slots, None])
        return {"hidden_states": out.view_as(hidden_states), "router_logits": logits, "load": index.flatten().bincount(), "aux": None}


Output = namedtuple("Output", ["last_hidden_state", "index", "loss"])


class NamedTuple(Block):
    """Returns a named tuple with a loss in it."""

    def forward(self, hidden_states: Tensor) -> Output:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, logits = self.route(x)
        loss = logits.logsumexp(dim=-1).square().mean()
        out = x.new_zeros(x.shape)
        for i in range(self.num_experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, self.experts[i](x[rows]) * weights[rows, slots, None])
        return Output(out.view_as(hidden_states), index, loss)


class Rows(Block):
    """Takes and returns `[T, H]`."""

    def forward(self, x: Tensor) -> Tensor:
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


class Residual(Block):
    """The result starts as the input."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, shape[-1])
        index, weights, _ = self.route(x)
        out = x.clone()
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view(shape)


LOOPS = (
    Block, NotRenormalised, OnlyHit, Enumerated, EveryExpertOnEveryToken, Named, NamedItems, Mlps, Ffns, InAMethod, InFloat32,
    Dictionary, NamedTuple, Residual,
)  # fmt: skip
CASES = [
    *(Case(f"loop {kind.__name__}", kind) for kind in LOOPS),
    Case("loop Rows", Rows, tokens=(80,)),
    *(Case(f"expert {kind.__name__}", lambda kind=kind: Block(kind)) for kind in experts.KINDS),
    Case("H == I", lambda: Block(experts.Swapped, hidden=24, inner=24)),
    Case("E == H", lambda: Block(experts.Backwards, count=16, hidden=16, inner=24)),
    Case("E == 2I", lambda: Block(experts.Numbered, count=8, hidden=32, inner=4)),
    Case("H == I, ungated", lambda: Block(experts.OutputFirst, hidden=24, inner=24)),
    Case("K == E", lambda: Block(count=3, top_k=3)),
    Case("K == 1", lambda: NotRenormalised(top_k=1)),
]

"""Blocks whose experts are stacked in parameters, without transformers' decorator: layouts, arguments and forms of the routing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Case, E, H, I, K, experts


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.2)


class Stack(nn.Module):
    """gate_up `[E,2I,H]` and down `[E,H,I]`, called with (x, index, weights). The others differ in `mlp` or in `forward`."""

    def __init__(self, count: int = E, hidden: int = H, inner: int = I) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.inner = count, hidden, inner
        self.make()

    def make(self) -> None:
        self.gate_up_proj = parameter(self.num_experts, 2 * self.inner, self.hidden)
        self.down_proj = parameter(self.num_experts, self.hidden, self.inner)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])

    def mixed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows, slots = torch.where(index == e)
            out.index_add_(0, rows, (self.mlp(e, x[rows]) * weights[rows, slots, None]).to(x.dtype))
        return out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.mixed(hidden_states, top_k_index, top_k_weights)


class Transposed(Stack):
    """`[E,H,2I]` and `[E,I,H]`; up comes before gate; called with (index, weights, x)."""

    def make(self) -> None:
        self.gate_up_proj = parameter(self.num_experts, self.hidden, 2 * self.inner)
        self.down_proj = parameter(self.num_experts, self.inner, self.hidden)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up_proj[e]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down_proj[e]

    def forward(self, selected: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return self.mixed(hidden, selected, scores)


class UpFirst(Stack):
    """The first half is up, the second the gate."""

    def mlp(self, e: int, x: Tensor) -> Tensor:
        up, gate = F.linear(x, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])


class Interleaved(Transposed):
    """Gate and up alternate; the weights come last and by name only."""

    def mlp(self, e: int, x: Tensor) -> Tensor:
        both = x @ self.gate_up_proj[e]
        return (F.gelu(both[..., ::2]) * both[..., 1::2]) @ self.down_proj[e]

    def forward(self, x: Tensor, *, ids: Tensor, probs: Tensor) -> Tensor:  # type: ignore[override]
        return self.mixed(x, ids, probs)


class Biased(Stack):
    """With biases, and the clamped gate of gpt-oss."""

    def make(self) -> None:
        super().make()
        self.gate_up_proj_bias = parameter(self.num_experts, 2 * self.inner)
        self.down_proj_bias = parameter(self.num_experts, self.hidden)
        self.alpha, self.limit = 1.702, 1.5

    def mlp(self, e: int, x: Tensor) -> Tensor:
        both = F.linear(x, self.gate_up_proj[e], self.gate_up_proj_bias[e])
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        return F.linear((up + 1) * gate * torch.sigmoid(self.alpha * gate), self.down_proj[e], self.down_proj_bias[e])


class OneBias(Stack):
    """A bias on the way down alone."""

    def make(self) -> None:
        super().make()
        self.bias = parameter(self.num_experts, self.hidden)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return super().mlp(e, x) + self.bias[e]


class Plain(Stack):
    """Without gate."""

    def make(self) -> None:
        self.wi, self.wo = parameter(self.num_experts, self.hidden, self.inner), parameter(self.num_experts, self.inner, self.hidden)
        self.act = nn.GELU(approximate="tanh")

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return self.act(x @ self.wi[e]) @ self.wo[e]


class Three(Stack):
    """Three stacks w1, w3 `[E,I,H]` and w2 `[E,H,I]`."""

    def make(self) -> None:
        e, h, i = self.num_experts, self.hidden, self.inner
        self.w1, self.w2, self.w3 = parameter(e, i, h), parameter(e, h, i), parameter(e, i, h)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.w1[e])) * F.linear(x, self.w3[e]), self.w2[e])


class ThreeTransposed(Three):
    """`[E,H,I]`, `[E,H,I]` and `[E,I,H]`, w3 activated, called with (x, weights, index)."""

    def make(self) -> None:
        e, h, i = self.num_experts, self.hidden, self.inner
        self.w1, self.w2, self.w3 = parameter(e, h, i), parameter(e, i, h), parameter(e, h, i)

    def mlp(self, e: int, x: Tensor) -> Tensor:
        return (F.silu(x @ self.w3[e]) * (x @ self.w1[e])) @ self.w2[e]

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        return self.mixed(x, index, weights)


class Flat(Stack):
    """Flattened `[E*I,H]`, used as they are for the first two and transposed for the way down."""

    def make(self) -> None:
        rows = self.num_experts * self.inner
        self.w1, self.v1, self.w2 = (parameter(rows, self.hidden) for _ in range(3))

    def mlp(self, e: int, x: Tensor) -> Tensor:
        w1, v1, w2 = (w.view(self.num_experts, self.inner, self.hidden)[e] for w in (self.w1, self.v1, self.w2))
        return (F.silu(x @ w1.t()) * (x @ v1.t())) @ w2


class Dense(Stack):
    """Given the weights of all experts `[T,E]`, and the index."""

    def forward(self, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows, _ = torch.where(index == e)
            out.index_add_(0, rows, self.mlp(e, x[rows]) * scores[rows, e, None])
        return out


class DenseAlone(Stack):
    """Given the weights of all experts `[T,E]` alone, zero where they are not chosen."""

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        gate, up = torch.einsum("th,eih->tei", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("tei,ehi,te->th", F.silu(gate) * up, self.down_proj, scores)


class Masked(Stack):
    """Given a mask of the chosen experts `[T,E]` and the weights of all `[T,E]`."""

    def forward(self, x: Tensor, mask: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            (rows,) = torch.where(mask[:, e])
            out.index_add_(0, rows, self.mlp(e, x[rows]) * scores[rows, e, None])
        return out


class Single(Stack):
    """Top-1: vectors."""

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.mixed(x, index[:, None], weight[:, None])


class PreWeighted(Transposed):
    """One argument: E times the tokens, already weighted, zero where an expert is not chosen."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        batch = hidden.view(self.num_experts, -1, self.hidden)
        gate, up = torch.bmm(batch, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), self.down_proj).view(-1, self.hidden)


class Counted(Stack):
    """Sorted rows, and how many of them each expert gets."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:  # type: ignore[override]
        return torch.cat([self.mlp(e, part) for e, part in enumerate(rows.split(counts.tolist()))])


class Whole(nn.Module):
    """Takes part of the routing upon itself: the block's forward is given hidden states `[B,S,H]`."""

    def __init__(self, stack: type[Stack], call: str = "{x}, {index}, {weights}", top_k: int = K, **sizes: int) -> None:
        super().__init__()
        self.experts = stack(**sizes)
        self.router = nn.Linear(self.experts.hidden, self.experts.num_experts, bias=False)
        self.top_k, self.call = top_k, call

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.router(x)
        weights, index = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = self.mix(x, index, weights)
        return out.reshape(hidden_states.shape), logits

    def mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.call == "x index weights":
            return self.experts(x, index, weights)
        if self.call == "index weights x":
            return self.experts(index, weights, x)
        if self.call == "x weights index":
            return self.experts(x, weights, index)
        if self.call == "names":
            return self.experts(x, probs=weights, ids=index)
        if self.call == "vectors":
            return self.experts(x, index[:, 0], weights[:, 0])
        dense = torch.zeros(len(x), self.experts.num_experts, dtype=x.dtype).scatter(1, index, weights)
        if self.call == "x index dense":
            return self.experts(x, index, dense)
        if self.call == "x mask dense":
            return self.experts(x, dense > 0, dense)
        if self.call == "x dense":
            return self.experts(x, dense)
        if self.call == "pre-weighted":
            return self.experts((x[None] * dense.t()[..., None]).reshape(-1, x.shape[1])).view(-1, *x.shape).sum(0)
        assert self.call == "counts"
        order = index.flatten().argsort(stable=True)
        y = self.experts(x[order // self.top_k], index.flatten().bincount(minlength=self.experts.num_experts))
        slots = torch.zeros_like(y).index_copy(0, order, y).view(*index.shape, -1)
        return (slots * weights[..., None]).sum(dim=1)


class Parallel(nn.Module):
    """E linear maps in one parameter, called with sorted rows and counts."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = parameter(count, out, width)

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:
        parts = inputs.split(expert_size if isinstance(expert_size, list) else expert_size.tolist())
        return torch.cat([F.linear(part, self.weight[e]) for e, part in enumerate(parts)], dim=0)


class Linears(nn.Module):
    """Two such layers, with the gate between them in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.input_linear = Parallel(E, H, 2 * I)
        self.output_linear = Parallel(E, I, H)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, H)
        weights, index = self.router(x).topk(K, dim=-1)
        weights = weights.softmax(-1)
        order = index.flatten().argsort(stable=True)
        counts = index.flatten().bincount(minlength=E).tolist()
        gate, up = self.input_linear(x[order // K], counts).chunk(2, dim=-1)
        y = self.output_linear(F.silu(gate) * up, counts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, y).view(hidden_states.shape)


class InTheBlock(nn.Module):
    """The stacks are parameters of the block itself, which routes inside its forward and calls a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.w_in, self.w_out = parameter(E, 2 * I, H), parameter(E, H, I)
        self.shared = experts.Gated(H, I)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, H)
        weights, index = self.router(rows).sigmoid().topk(K)
        return self.mixture(rows, index, weights).view_as(x) + self.shared(x)

    def mixture(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for e in range(E):
            at, slot = torch.where(index == e)
            gate, up = F.linear(rows[at], self.w_in[e]).chunk(2, -1)
            out.index_add_(0, at, F.linear(F.silu(gate) * up, self.w_out[e]) * weights[at, slot, None])
        return out


def _case(name: str, stack: type[Stack], call: str, path: str = "fused", **options: int) -> Case:
    return Case(f"stack {name}", lambda: Whole(stack, call, **options), path)


CASES = [
    _case("Stack", Stack, "x index weights"),
    _case("Transposed", Transposed, "index weights x"),
    _case("Interleaved", Interleaved, "names"),
    _case("Biased", Biased, "x index weights"),
    _case("OneBias", OneBias, "x index weights"),
    _case("Plain", Plain, "x index weights"),
    _case("Three", Three, "x index weights"),
    _case("ThreeTransposed", ThreeTransposed, "x weights index"),
    _case("Flat", Flat, "x index weights"),
    _case("Dense", Dense, "x index dense"),
    _case("Masked", Masked, "x mask dense"),
    _case("Single", Single, "vectors", top_k=1),
    _case("PreWeighted", PreWeighted, "pre-weighted"),
    _case("Counted", Counted, "counts"),
    _case("square, H == 2I", Transposed, "index weights x", hidden=32, inner=16),
    _case("square, H == 2I, as linear layers", Stack, "x index weights", hidden=32, inner=16),
    _case("square, ungated", Plain, "x index weights", hidden=24, inner=24),
    _case("square, three", ThreeTransposed, "x weights index", hidden=24, inner=24),
    _case("square, three, as linear layers", Three, "x index weights", hidden=24, inner=24),
    _case("square, flat", Flat, "x index weights", hidden=16, inner=16, count=4),
    _case("E == H == 2I", Stack, "x index weights", count=16, hidden=16, inner=8),
    _case("K == E", Stack, "x index weights", count=3, top_k=3),
    Case("stack Linears", Linears, "composed"),
    Case("stack InTheBlock", InTheBlock),
]

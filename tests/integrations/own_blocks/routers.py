"""Blocks with one module per expert whose router is the odd part: groups, corrections, noise, no gradient, experts without weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Case, E, H, I, K, experts
from .lists import Block


class WithLoss(torch.autograd.Function):
    """Passes hidden states through and gives the auxiliary loss a gradient of one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype)


class LossGate(nn.Module):
    """Returns (index, weights, auxiliary loss); the loss in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scores = F.linear(x.flatten(0, -2), self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, index = torch.topk(scores, k=K, dim=-1, sorted=False)
        if not self.training:
            return index, weights, None
        load = F.one_hot(index.flatten(), E).float().mean(0)
        return index, weights, 0.1 * E * (load * scores.mean(0)).sum()


class GroupGate(nn.Module):
    """Sigmoid scores; experts are chosen by corrected scores, within the best of three groups; the weights are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        self.register_buffer("e_score_correction_bias", torch.linspace(-0.2, 0.2, E))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = F.linear(x.flatten(0, -2).float(), self.weight.float()).sigmoid()
        corrected = scores + self.e_score_correction_bias.float()
        groups = corrected.view(-1, 3, E // 3).topk(2, dim=-1).values.sum(-1)
        best = torch.zeros_like(groups).scatter(1, groups.topk(2, dim=-1).indices, 1)
        allowed = best.unsqueeze(-1).expand(-1, 3, E // 3).reshape(-1, E).bool()
        index = corrected.masked_fill(~allowed, float("-inf")).topk(K, dim=-1).indices
        weights = scores.gather(1, index)
        return index, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), None


class TwoWays(nn.Module):
    """Repeated tokens and a loop in training, sorted tokens in a method in evaluation."""

    gate_class: type[nn.Module] = LossGate

    def __init__(self) -> None:
        super().__init__()
        self.num_experts_per_tok = K
        self.experts = nn.ModuleList(experts.Gated(H, I) for _ in range(E))
        self.gate = self.gate_class()
        self.shared_experts = experts.Gated(H, 2 * I)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity = hidden_states
        orig_shape = hidden_states.shape
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        flat_topk_idx = topk_idx.view(-1)
        if self.training:
            hidden_states = hidden_states.repeat_interleave(self.num_experts_per_tok, dim=0)
            y = torch.empty_like(hidden_states)
            for i, expert in enumerate(self.experts):
                y[flat_topk_idx == i] = expert(hidden_states[flat_topk_idx == i])
            y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1)
            y = y.to(hidden_states.dtype).view(*orig_shape)
            if aux_loss is not None:
                y = WithLoss.apply(y, aux_loss)
        else:
            y = self.moe_infer(hidden_states, topk_idx, topk_weight).view(*orig_shape)
        return y + self.shared_experts(identity)

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        per_expert = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts))).scatter_(1, topk_ids, 1).sum(dim=0)
        order = topk_ids.view(-1).argsort()
        rows = x[order // topk_ids.shape[1]]
        outputs, begin = [], 0
        for i, count in enumerate(per_expert.tolist()):
            if count == 0:
                continue
            outputs.append(self.experts[i](rows[begin : begin + count]))
            begin += count
        together = torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)
        back = torch.empty_like(together)
        back[order] = together
        weighted = back.view(*topk_ids.shape, -1).type(topk_weight.dtype).mul(topk_weight.unsqueeze(-1))
        return weighted.sum(dim=1).type(back.dtype)


class TwoWaysInGroups(TwoWays):
    gate_class = GroupGate


class WithoutGradient(TwoWays):
    """In evaluation nothing of the experts has a gradient."""

    gate_class = GroupGate

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(topk_ids == i)
            out.index_add_(0, rows, (expert(x[rows]) * topk_weight[rows, slots, None]).to(x.dtype))
        return out


class EvaluationOnly(TwoWays):
    """Cannot be trained at all: in training there is no result."""

    gate_class = GroupGate

    def forward(self, hidden_states: Tensor) -> Tensor:
        topk_idx, topk_weight, _ = self.gate(hidden_states)
        if not self.training:
            y = self.moe_infer(hidden_states.view(-1, H), topk_idx, topk_weight).view(hidden_states.shape)
        return y + self.shared_experts(hidden_states)


class Jitter(Block):
    """Multiplies its input by noise in training, in place; and adds noise to the logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        if self.training:
            hidden_states *= torch.empty_like(hidden_states).uniform_(0.9, 1.1)
        x = hidden_states.view(-1, shape[-1])
        logits = self.gate(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * 0.1
        weights, index = logits.softmax(-1).topk(self.top_k)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view(shape), logits


class FrozenRouter(Block):
    """The router runs under no_grad."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        with torch.no_grad():
            index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Best(Block):
    """Top-1 by argmax; index and weight are vectors."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, index = self.gate(x).softmax(-1).max(dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (index == i).nonzero()[:, 0]
            out[rows] = expert(x[rows]) * weight[rows].unsqueeze(-1)
        return out.reshape(hidden_states.shape)


class Hard(Block):
    """Top-1 without a weight: the router learns from an auxiliary loss alone."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        index = logits.argmax(dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = index == i
            out[chosen] = expert(x[chosen])
        return out.reshape(hidden_states.shape), logits


class OneHot(Block):
    """Top-1 as a mask `[T, E]` that is made before the loop."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities = self.gate(x).softmax(-1)
        mask = F.one_hot(probabilities.argmax(dim=-1), self.num_experts).bool()
        weight = probabilities.max(dim=-1).values
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[mask[:, i]] = expert(x[mask[:, i]])
        return (out * weight[:, None]).reshape(hidden_states.shape)


class Nothing(Block):
    """The router has two scores more than there are experts: tokens sent there stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E + 2, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i in range(E + 2):
            rows, slots = torch.where(index == i)
            y = self.experts[i](x[rows]) if i < E else x[rows]
            out.index_add_(0, rows, y * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Dropped(Nothing):
    """Tokens sent to the scores beyond the experts get nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Identities(Nothing):
    """The same as members of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts.extend(nn.Identity() for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class TwoRounds(Block):
    """The second expert is the best of what is left, and each weight is a softmax of its round."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        first = logits.max(dim=-1, keepdim=True).indices
        left = logits.scatter(-1, first, float("-inf"))
        second = left.max(dim=-1, keepdim=True).indices
        weights = torch.cat([logits.softmax(-1).gather(-1, first), left.softmax(-1).gather(-1, second)], dim=-1)
        return torch.cat([first, second], dim=-1), weights, logits


class InnerRouter(nn.Module):
    """The router is two layers deep in a module of its own, and gives int32 indices."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"hidden": nn.Linear(H, 20), "scores": nn.Linear(20, E)})
        self.experts = nn.ModuleList(experts.Ungated(H, I) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, H)
        scores = self.router["scores"](torch.tanh(self.router["hidden"](tokens)))
        top, index = scores.sigmoid().topk(K, sorted=False)
        index = index.int()
        y = torch.zeros_like(tokens)
        for e in range(E):
            where, slot = (index == e).nonzero(as_tuple=True)
            y.index_add_(0, where, self.experts[e](tokens[where]) * top[where, slot, None])
        return y.reshape_as(x)


class Remembers(Block):
    """Keeps a loss, its logits and a count of calls, as attributes that a trainer reads; and the load of the experts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, []
        self.register_buffer("load", torch.zeros(E))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, logits = self.route(x)
        self.calls += 1
        self.history.append(self.calls)
        self.router_logits = logits
        self.aux_loss = logits.logsumexp(-1).square().mean()
        self.load = self.load + index.flatten().bincount(minlength=E)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class OntoShared(Block):
    """The result starts as what the shared expert gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = experts.Gated(H, I)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        out = self.shared(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


#: What `Reports` has told, as a logger or a communication library outside of the model would keep it.
REPORTED: list[int] = []


class Reports(Block):
    """Tells the world how many slots it filled; nothing reads the answer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, _ = self.route(x)
        told = REPORTED.append(index.numel())  # noqa: F841  (the call is what counts)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out.view_as(hidden_states)


class Tied(Block):
    """All experts share one way down."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.down_proj = self.experts[0].down_proj


KINDS = (
    TwoWays, TwoWaysInGroups, WithoutGradient, Jitter, FrozenRouter, Best, Hard, OneHot, Nothing, Dropped, Identities, TwoRounds,
    InnerRouter, OntoShared, Remembers, Reports, Tied,
)  # fmt: skip
CASES = [
    *(Case(f"router {kind.__name__}", kind) for kind in KINDS),
    Case("router EvaluationOnly", EvaluationOnly, modes=(False,)),
]

"""A small MoE layer as a user would write it: router, softmax, top-k, and the op. Shared by the compile and export tests.

`layer(x [T,H], top_k_index [T,K] | None) -> (y [T,H], top_k_index [T,K])`. The index is an argument and a result so that plain
PyTorch, in another dtype, can follow the same routing: near a tie the choice of experts depends on rounding and is not what these
tests compare.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_ext import reference
from moe_ext.experts import ExpertSpec, ExpertWeights
from moe_ext.functional import grouped_experts

E, H, I, K = 6, 24, 12, 3  # noqa: E741  (the project's names)


class StackedLayer(nn.Module):
    """Stacked weights, the fused op."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.top_k = K
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Linear(H, E, bias=False, dtype=dtype)
        self.router.weight.data.copy_(torch.randn(E, H, generator=generator))
        gate_up_proj = torch.randn(E, 2 * I, H, generator=generator).div(H**0.5).to(dtype)
        down_proj = torch.randn(E, H, I, generator=generator).div(I**0.5).to(dtype)
        self.set_weights(gate_up_proj, down_proj)

    def set_weights(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_proj), nn.Parameter(down_proj)

    def weights(self) -> ExpertWeights:
        return ExpertWeights(gate_up_proj=self.gate_up_proj, down_proj=self.down_proj)

    def experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.ops.moe.grouped_forward(x, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)

    def forward(self, x: Tensor, top_k_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probabilities = self.router(x).softmax(-1)
        if top_k_index is None:
            top_k_index = probabilities.topk(self.top_k, dim=-1).indices
        return self.experts(x, top_k_index, probabilities.gather(-1, top_k_index)), top_k_index


class ListLayer(StackedLayer):
    """One parameter per expert and projection, the fused op's list overload."""

    def set_weights(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        gate_proj, up_proj = gate_up_proj.chunk(2, dim=1)
        for name, stack in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
            setattr(self, name, nn.ParameterList([w.clone() for w in stack]))

    def weights(self) -> ExpertWeights:
        return ExpertWeights(gate_proj=list(self.gate_proj), up_proj=list(self.up_proj), down_proj=list(self.down_proj))

    def experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        w = self.weights()
        return torch.ops.moe.grouped_forward.list(x, top_k_index, top_k_weights, w.gate_proj, w.up_proj, w.down_proj)


class ComposedLayer(StackedLayer):
    """Stacked weights, the primitives."""

    def experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return grouped_experts(x, top_k_index, top_k_weights, self.weights(), path="composed")


class ComposedListLayer(ListLayer):
    """One parameter per expert and projection, the primitives."""

    def experts(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return grouped_experts(x, top_k_index, top_k_weights, self.weights(), path="composed")


LAYERS = {"stacked": StackedLayer, "list": ListLayer, "composed": ComposedLayer, "composed_list": ComposedListLayer}


def plain(layer: StackedLayer, x: Tensor, top_k_index: Tensor) -> Tensor:
    """What `layer` computes, in plain PyTorch."""
    top_k_weights = layer.router(x).softmax(-1).gather(-1, top_k_index)
    return reference.grouped_experts(x, top_k_index, top_k_weights, layer.weights(), ExpertSpec())


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(count)).to(dtype)

"""The other ways to compute an expert layer, on the same weights: transformers' experts functions and the loop over a ModuleList.

Every peer is `function(x [T,H], top_k_index [T,K], top_k_weights [T,K]) -> [T,H]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Shape

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")


def transformers_experts(shape: Shape, gate_up_proj: nn.Parameter, down_proj: nn.Parameter) -> dict[str, Experts] | str:
    """transformers' own Qwen3-MoE experts module, once per implementation, all with these parameters; or why there is none."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return "needs transformers 5"
    found: dict[str, Experts] = {}
    for implementation in TRANSFORMERS:
        config = Qwen3MoeConfig(
            hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.K, hidden_act="silu"
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = gate_up_proj, down_proj
        found[implementation] = module
    return found


def module_list_loop(gate_proj: Sequence[Tensor], up_proj: Sequence[Tensor], down_proj: Sequence[Tensor]) -> Experts:
    """The loop of models that keep one nn.Linear per expert and projection, as in transformers 4: only experts with tokens run."""

    def experts(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(top_k_index, num_classes=len(down_proj)).permute(2, 1, 0)
        for e in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            k, token = torch.where(mask[e])
            rows = x[token]
            act = F.silu(F.linear(rows, gate_proj[e])) * F.linear(rows, up_proj[e])
            y = F.linear(act, down_proj[e]) * top_k_weights[token, k, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    return experts

"""`grouped_experts`: an expert layer from its weights (`ExpertWeights`) and its description (`ExpertSpec`)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import ops
from .experts import ExpertSpec, ExpertWeights, ListedWeights, Projection, StackedWeights


def grouped_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec = ExpertSpec(),  # noqa: B008  (frozen)
    *,
    path: Literal["auto", "fused", "composed"] = "auto",
) -> Tensor:
    """Computes an expert layer: `out[t] = sum_k top_k_weights[t,k] * down_e(act(gate_e x[t]) * up_e x[t])`, `e = top_k_index[t,k]`.

    On the CPU the fused and the composed path return the same bits. On CUDA they may run other kernels, and agree by the error rule.

    Args:
        hidden_states: `[..., H]`.
        top_k_index: `[..., K]`, int32 or int64. An id outside `[0, E)` drops its slot.
        top_k_weights: `[..., K]`, any float dtype.
        weights: The tensors of the experts.
        spec: How the experts compute. The default is silu with a gate.
        path: "fused" runs the op `moe::grouped_forward`. "composed" runs the steps as ops: sort, permute, grouped_mm, activation,
            grouped_mm, unpermute; a `gate_fn`, a `post_norm` or a `Projection` needs it. "auto" takes the fused op if it can.

    Returns:
        A tensor with the shape and the dtype of hidden_states.

    Raises:
        ValueError: If path is not one of the three, or if path="fused" cannot run spec or weights.
        RuntimeError: If the tensors do not fit.
    """
    if path not in ("auto", "fused", "composed"):
        raise ValueError(f"path={path!r} is not one of 'auto', 'fused', 'composed'")
    fusable = spec.fusable and weights.fusable
    if path == "fused" and not fusable:
        what = "weights that are no plain tensors" if spec.fusable else "a gate_fn or a post_norm"
        raise ValueError(f"path='fused' cannot run {what}; use path='auto' or 'composed'")
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    index = top_k_index.reshape(-1, top_k_index.shape[-1])
    w = top_k_weights.reshape(-1, top_k_weights.shape[-1])
    run = _composed if path == "composed" or not fusable else _fused
    return run(x, index, w, weights, spec).reshape(hidden_states.shape)


def _fused(x: Tensor, index: Tensor, w: Tensor, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    options = {"activation": spec.activation, "gated": spec.gated, "alpha": spec.alpha, "limit": spec.limit}
    if spec.recompute:
        options["recompute"] = True
    if isinstance(weights, StackedWeights):
        return ops.moe.grouped_forward(
            x, index, w, weights.gate_up_proj, weights.down_proj, weights.gate_up_bias, weights.down_bias,
            transposed=spec.transposed, interleaved=spec.interleaved, **options,
        )  # fmt: skip
    if isinstance(weights, ListedWeights):
        return ops.moe.grouped_forward.list(
            x, index, w, weights.gate(spec) or [], weights.up_proj, weights.down_proj,
            weights.gate_bias, weights.up_bias, weights.down_bias, **options,
        )  # fmt: skip
    raise _neither(weights)


def _composed(x: Tensor, index: Tensor, w: Tensor, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    expert_offsets, row_to_slot, slot_to_row = ops.sort_by_expert(index, weights.num_experts)
    top_k = index.shape[1]
    pre_act = _pre_activation(ops.permute(x, row_to_slot, slot_to_row, top_k), expert_offsets, weights, spec)
    if spec.gate_fn is not None:
        act = spec.gate_fn(pre_act)
    else:
        act = ops.gated_activation(
            pre_act, activation=spec.activation, gated=spec.gated, interleaved=spec.interleaved, alpha=spec.alpha, limit=spec.limit
        )
    y = _project(act.to(x.dtype), weights.down_proj, expert_offsets, weights.down_bias, spec.transposed and weights.stacked)
    if spec.post_norm is not None:
        y = spec.post_norm(y)
    return ops.unpermute(y, row_to_slot, slot_to_row, top_k, w)


def _pre_activation(rows: Tensor, expert_offsets: Tensor, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    if isinstance(weights, StackedWeights):
        return _project(rows, weights.gate_up_proj, expert_offsets, weights.gate_up_bias, spec.transposed)
    if not isinstance(weights, ListedWeights):
        raise _neither(weights)
    up = _project(rows, weights.up_proj, expert_offsets, weights.up_bias)
    gate_proj = weights.gate(spec)
    return up if gate_proj is None else torch.cat((_project(rows, gate_proj, expert_offsets, weights.gate_bias), up), dim=-1)


def _neither(weights: object) -> TypeError:
    return TypeError(f"weights is a {type(weights).__name__}; expected StackedWeights or ListedWeights")


def _project(rows: Tensor, weight: Any, expert_offsets: Tensor, bias: Any, transposed: bool = False) -> Tensor:
    if not isinstance(weight, Projection):
        return ops.grouped_mm(rows, weight, expert_offsets, bias, transposed=transposed)
    out = weight.grouped_mm(rows, expert_offsets)
    if bias is None:
        return out
    row = torch.arange(out.shape[0], dtype=torch.int32, device=out.device)
    expert = torch.bucketize(row, expert_offsets[1:], right=True).clamp(max=len(weight) - 1)  # rows past the last offset are not read
    return out + (bias if isinstance(bias, Tensor) else torch.stack(list(bias)))[expert].to(out.dtype)

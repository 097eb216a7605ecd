"""Every op of `torch.ops.moe` and `torch.ops.moe_ext` in plain PyTorch, with the same signature: slow, readable, differentiable, any dtype.
In float64 they are the truth, in another dtype the yardstick of the error rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext import reference
from moe_ext._needs import Needs
from moe_ext.experts import ExpertSpec, ExpertWeights


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = top_k_index.reshape(-1).long()
    kept = (ids >= 0) & (ids < num_experts)
    used = int(kept.sum())
    order = torch.sort(ids.where(kept, num_experts), stable=True).indices[:used]
    counts = torch.bincount(ids[kept], minlength=num_experts)
    row_to_slot, slot_to_row = torch.full_like(ids, -1), torch.full_like(ids, -1)
    row_to_slot[:used] = order
    slot_to_row[order] = torch.arange(used, device=ids.device)
    return F.pad(counts.cumsum(0), (1, 0)).int(), row_to_slot.int(), slot_to_row.int()


def _pick(source: Tensor, index: Tensor, divisor: int = 1) -> Tensor:
    """source[index // divisor], zero where index < 0."""
    found = source[index.clamp(min=0).long() // divisor]
    return torch.where((index >= 0)[:, None], found, torch.zeros((), dtype=found.dtype))


def permute(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> Tensor:
    return _pick(x, row_to_slot, top_k)


def unpermute(rows: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, top_k_weights: Tensor | None = None) -> Tensor:
    y = _pick(rows, slot_to_row)
    if top_k_weights is not None:
        y = (y * top_k_weights.reshape(-1, 1)).to(rows.dtype)
    return y.unflatten(0, (-1, top_k)).sum(1)


def unpermute_backward(grad: Tensor, rows: Tensor, row_to_slot: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    g = _pick(grad, row_to_slot, top_k_weights.shape[1])
    grad_rows = g * _pick(top_k_weights.reshape(-1, 1), row_to_slot)
    used = row_to_slot[row_to_slot >= 0].long()
    grad_weights = torch.zeros_like(top_k_weights).reshape(-1)
    grad_weights[used] = (g * rows).sum(-1)[: len(used)].to(top_k_weights.dtype)
    return grad_rows.to(rows.dtype), grad_weights.view_as(top_k_weights)


def _segments(expert_offsets: Tensor) -> Iterator[slice]:
    bounds = expert_offsets.tolist()
    yield from (slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False))


def grouped_mm(x: Tensor, weight: Any, expert_offsets: Tensor, bias: Any = None, *, transposed: bool = False) -> Tensor:
    parts = []
    for e, rows in enumerate(_segments(expert_offsets)):
        parts.append(F.linear(x[rows], weight[e].T if transposed else weight[e], None if bias is None else bias[e]))
    unused = x.shape[0] - sum(len(p) for p in parts)
    return torch.cat([*parts, x.new_zeros(unused, parts[0].shape[1])])


def grouped_mm_wgrad(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    return torch.stack(grouped_mm_wgrad_list(a, b, expert_offsets))


def grouped_mm_wgrad_list(a: Tensor, b: Tensor, expert_offsets: Tensor) -> list[Tensor]:
    return [a[rows].T @ b[rows] for rows in _segments(expert_offsets)]


def grouped_bias_grad(grad: Tensor, expert_offsets: Tensor) -> Tensor:
    return torch.stack([grad[rows].sum(0) for rows in _segments(expert_offsets)])


def gated_activation(pre_act: Tensor, **options: Any) -> Tensor:
    return reference.activation(pre_act, ExpertSpec(**options))


def gated_activation_backward(grad: Tensor, pre_act: Tensor, **options: Any) -> Tensor:
    with torch.enable_grad():
        leaf = pre_act.detach().requires_grad_()
        return torch.autograd.grad(gated_activation(leaf, **options), leaf, grad)[0]


def _spec(options: dict[str, Any]) -> ExpertSpec:
    return ExpertSpec(**{k: v for k, v in options.items() if k != "needs"})


def grouped_forward(
    x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Any = None, down_bias: Any = None, **options: Any
) -> Tensor:
    weights = ExpertWeights(gate_up_proj=gate_up, down_proj=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
    return reference.grouped_experts(x, ids, w, weights, _spec(options))


def grouped_forward_list(
    x: Tensor, ids: Tensor, w: Tensor, gate: Any, up: Any, down: Any, gate_bias: Any = None, up_bias: Any = None, down_bias: Any = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    weights = ExpertWeights(gate_proj=gate, up_proj=up, down_proj=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    return reference.grouped_experts(x, ids, w, weights, _spec(options))


def _up_projection(rows: Tensor, maps: Any, spec: ExpertSpec, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> Tensor:
    pre_act = grouped_mm(rows, up, maps[0], up_bias, transposed=spec.transposed)
    return torch.cat([grouped_mm(rows, gate, maps[0], gate_bias), pre_act], -1) if gate else pre_act


def grouped_forward_train(
    x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Any = None, down_bias: Any = None, **options: Any
) -> tuple[Tensor, ...]:
    maps = sort_by_expert(ids, len(gate_up))
    rows = permute(x, *maps[1:], ids.shape[1])
    pre_act = _up_projection(rows, maps, _spec(options), None, gate_up, None, gate_up_bias)
    return grouped_forward(x, ids, w, gate_up, down, gate_up_bias, down_bias, **options), pre_act, *maps


def grouped_forward_train_list(
    x: Tensor, ids: Tensor, w: Tensor, gate: Any, up: Any, down: Any, gate_bias: Any = None, up_bias: Any = None, down_bias: Any = None,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    maps = sort_by_expert(ids, len(up))
    rows = permute(x, *maps[1:], ids.shape[1])
    pre_act = _up_projection(rows, maps, _spec(options), gate, up, gate_bias, up_bias)
    return grouped_forward_list(x, ids, w, gate, up, down, gate_bias, up_bias, down_bias, **options), pre_act, *maps


def _backward(grad: Tensor, x: Any, w: Tensor, pre_act: Tensor, maps: Any, ups: list[Any], down: Any, down_bias: Any, options: Any) -> Any:
    """Gradients by bit of `Needs`: autograd through everything after the pre-activation, then the up projections by hand."""
    spec, needs, top_k = _spec(options), Needs(options["needs"]), w.shape[1]
    offsets, r2s, s2r = maps
    listed = not isinstance(down, Tensor)
    with torch.enable_grad():
        pre, w_ = pre_act.detach().requires_grad_(), w.detach().requires_grad_()
        act = reference.activation(pre, spec)
        downs = [d.detach().requires_grad_() for d in down]
        biases = [pre.new_zeros(grad.shape[1], requires_grad=True) if down_bias is None else b.detach().requires_grad_()
                  for b in (down if down_bias is None else down_bias)]  # fmt: skip
        out = unpermute(grouped_mm(act, downs, offsets, biases, transposed=spec.transposed), r2s, s2r, top_k, w_)
        found = torch.autograd.grad(out, [pre, w_, *downs, *biases], grad)
    d_pre, d_w, d_down, d_bias = found[0], found[1], found[2 : 2 + len(downs)], found[2 + len(downs) :]
    pack = list if listed else lambda ts: [torch.stack(list(ts))]
    results: dict[Needs, list[Tensor]] = {Needs.TOP_K_WEIGHTS: [d_w], Needs.DOWN: pack(d_down), Needs.DOWN_BIAS: pack(d_bias)}
    parts = d_pre.chunk(len(ups), -1)
    d_rows = sum(grouped_mm(d, up, offsets, transposed=not spec.transposed) for d, up in zip(parts, ups, strict=True))
    results[Needs.HIDDEN_STATES] = [unpermute(d_rows, r2s, s2r, top_k)]
    up_bits = [(Needs.GATE_UP, Needs.GATE_UP_BIAS), (Needs.UP, Needs.UP_BIAS)]
    for d, (bit, bias_bit) in zip(parts, up_bits[-len(ups) :] if listed else up_bits, strict=False):
        results[bias_bit] = pack(d[rows].sum(0) for rows in _segments(offsets))
        if x is not None:
            rows_x = permute(x, r2s, s2r, top_k)
            results[bit] = pack(grouped_mm_wgrad_list(*((rows_x, d) if spec.transposed else (d, rows_x)), offsets))
    return [t for bit in sorted(results) if bit in needs for t in results[bit]]


def grouped_backward(
    grad: Tensor, x: Any, w: Tensor, pre_act: Any, offsets: Tensor, r2s: Tensor, s2r: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Any = None, down_bias: Any = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    if pre_act is None:
        pre_act = _up_projection(permute(x, r2s, s2r, w.shape[1]), (offsets,), _spec(options), None, gate_up, None, gate_up_bias)
    return _backward(grad, x, w, pre_act, (offsets, r2s, s2r), [gate_up], down, down_bias, options)


def grouped_backward_list(
    grad: Tensor, x: Any, w: Tensor, pre_act: Any, offsets: Tensor, r2s: Tensor, s2r: Tensor, gate: Any, up: Any, down: Any,
    gate_bias: Any = None, up_bias: Any = None, down_bias: Any = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    if pre_act is None:
        pre_act = _up_projection(permute(x, r2s, s2r, w.shape[1]), (offsets,), _spec(options), gate, up, gate_bias, up_bias)
    return _backward(grad, x, w, pre_act, (offsets, r2s, s2r), [gate, up] if options["gated"] else [up], down, down_bias, options)

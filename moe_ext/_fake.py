"""Shapes and dtypes of every op without computing it (for torch.compile, export and the meta device). One function per schema.

What the op refuses at run time is refused here too, with the same sentence: _checks.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    Size,
    check,
    check_dim,
    check_float,
    check_ids,
    check_int32,
    check_like,
    check_listed,
    check_maps,
    check_mm,
    check_pre_act,
    check_routing,
    check_rows,
    check_saved,
    check_shape,
    check_stacked,
    check_wgrad,
)
from ._needs import Needs


def _devices(args: Any) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield str(arg.device)
        elif isinstance(arg, (list, tuple)):
            yield from _devices(arg)


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake, and one check: a single tensor on the meta device (an offloaded weight) sends a whole call
    here, where the result would be memory that nobody fills."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def checked(*args: Any, **options: Any) -> Any:
            devices = sorted(set(_devices(args)))
            if len(devices) > 1:
                op = name.partition(".")[0]
                raise RuntimeError(f"{op}: the tensors are on different devices: {', '.join(devices)}; move them to one of these")
            return fake(*args, **options)

        torch.library.register_fake(name)(checked)
        return fake

    return register


@register_fake("moe_ext::sort_by_expert")
def _(top_k_index, num_experts):
    check_ids("sort_by_expert", top_k_index)
    check(num_experts >= 1, "sort_by_expert", lambda: f"num_experts={num_experts}, expected at least 1")
    slots = top_k_index.shape[0] * top_k_index.shape[1]
    ints = [top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, slots, slots)]
    return tuple(ints)


@register_fake("moe_ext::permute")
def _(x, row_to_slot, slot_to_row, top_k):
    check_dim("permute", x, "x", 2, "[T, H]")
    check_float("permute", x, "x")
    slots = check_maps("permute", row_to_slot, slot_to_row, top_k)
    text = f"x has T={x.shape[0]} rows and top_k={top_k} but row_to_slot has {slots} entries"
    check(x.shape[0] * top_k == slots, "permute", lambda: text)
    return x.new_empty(row_to_slot.shape[0], x.shape[1])


@register_fake("moe_ext::unpermute")
def _(rows, row_to_slot, slot_to_row, top_k, top_k_weights=None):
    op = "unpermute"
    check_dim(op, rows, "rows", 2, "[S, H]")
    check_float(op, rows, "rows")
    slots = check_maps(op, row_to_slot, slot_to_row, top_k)
    check_shape(op, rows, "rows", slots, rows.shape[1])
    tokens = slots // top_k if top_k_weights is None else top_k_weights.shape[0]
    if top_k_weights is not None:
        check_float(op, top_k_weights, "top_k_weights")
        check_shape(op, top_k_weights, "top_k_weights", slots // top_k, top_k)
    return rows.new_empty(tokens, rows.shape[1])


@register_fake("moe_ext::unpermute_backward")
def _(grad, rows, row_to_slot, top_k_weights):
    op = "unpermute_backward"
    check_dim(op, rows, "rows", 2, "[S, H]")
    check_float(op, rows, "rows")
    check_float(op, top_k_weights, "top_k_weights")
    check_dim(op, top_k_weights, "top_k_weights", 2, "[T, K]")
    tokens, top_k = top_k_weights.shape
    check_shape(op, rows, "rows", tokens * top_k, rows.shape[1])
    check_shape(op, grad, "grad", tokens, rows.shape[1])
    check_like(op, grad, "grad", rows, "rows")
    check_int32(op, row_to_slot, "row_to_slot", tokens * top_k)
    return rows.new_empty(rows.shape), top_k_weights.new_empty(top_k_weights.shape)


@register_fake("moe_ext::grouped_mm")
def _(x, weight, expert_offsets, bias=None, *, transposed=False):
    op = "grouped_mm"
    check_rows(op, x, "x", expert_offsets)
    check_dim(op, weight, "weight", 3, "[E, N, K], or [E, K, N] with transposed=True")
    check_like(op, weight, "weight", x, "x")
    experts, *sizes = weight.shape
    inputs, outputs = sizes if transposed else sizes[::-1]
    if bias is not None:
        check_shape(op, bias, "bias", experts, outputs)
        check_like(op, bias, "bias", x, "x")
    check_mm(op, x, outputs, inputs, experts, expert_offsets)
    return x.new_empty(x.shape[0], outputs)


@register_fake("moe_ext::grouped_mm.list")
def _(x, weight, expert_offsets, bias=None, *, transposed=False):
    op = "grouped_mm"
    check_rows(op, x, "x", expert_offsets)
    check(len(weight) > 0, op, lambda: "the list of weights is empty")
    for w in weight:
        check_dim(op, w, "a weight of the list", 2, "[N, K], or [K, N] with transposed=True")
        check_shape(op, w, "a weight of the list", *weight[0].shape)
        check_like(op, w, "a weight of the list", x, "x")
    inputs, outputs = weight[0].shape if transposed else weight[0].shape[::-1]
    if bias is not None:
        check(len(bias) == len(weight), op, lambda: f"there are {len(bias)} biases for {len(weight)} weights")
        for b in bias:
            check_shape(op, b, "a bias of the list", outputs)
            check_like(op, b, "a bias of the list", x, "x")
    check_mm(op, x, outputs, inputs, len(weight), expert_offsets)
    return x.new_empty(x.shape[0], outputs)


@register_fake("moe_ext::grouped_mm_wgrad")
def _(a, b, expert_offsets):
    check_wgrad("grouped_mm_wgrad", a, b, expert_offsets)
    return a.new_empty(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1])


@register_fake("moe_ext::grouped_mm_wgrad.list")
def _(a, b, expert_offsets):
    check_wgrad("grouped_mm_wgrad", a, b, expert_offsets)
    return [a.new_empty(a.shape[1], b.shape[1]) for _ in range(expert_offsets.shape[0] - 1)]


@register_fake("moe_ext::grouped_bias_grad")
def _(grad, expert_offsets):
    check_rows("grouped_bias_grad", grad, "grad", expert_offsets)
    return grad.new_empty(expert_offsets.shape[0] - 1, grad.shape[1])


@register_fake("moe_ext::gated_activation")
def _(pre_act, *, gated=True, **options):
    return pre_act.new_empty(pre_act.shape[0], check_pre_act("gated_activation", pre_act, gated, **options))


@register_fake("moe_ext::gated_activation_backward")
def _(grad, pre_act, *, gated=True, **options):
    op = "gated_activation_backward"
    check_shape(op, grad, "grad", pre_act.shape[0], check_pre_act(op, pre_act, gated, **options))
    check_like(op, grad, "grad", pre_act, "pre_act")
    return pre_act.new_empty(pre_act.shape)


def _train(hidden_states: Tensor, top_k_index: Tensor, experts: Size, width: Size, recompute: bool) -> tuple[Tensor, ...]:
    """out, pre_act, expert_offsets, row_to_slot, slot_to_row."""
    slots = top_k_index.shape[0] * top_k_index.shape[1]
    ints = [hidden_states.new_empty(n, dtype=torch.int32) for n in (experts + 1, slots, slots)]
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(0 if recompute else slots, width), *ints


@register_fake("moe_ext::_grouped_forward_train")
def _stacked_forward(x, top_k_index, top_k_weights, gate_up, down, gate_up_bias=None, down_bias=None, *, recompute=False, **options):
    experts, width = check_stacked("grouped_forward", x, gate_up, down, gate_up_bias, down_bias, **options)
    check_routing("grouped_forward", x, top_k_index, top_k_weights)
    return _train(x, top_k_index, experts, width, recompute)


@register_fake("moe_ext::_grouped_forward_train.list")
def _listed_forward(
    x, top_k_index, top_k_weights, gate, up, down, gate_bias=None, up_bias=None, down_bias=None, *, recompute=False, **options
):
    experts, width = check_listed("grouped_forward", x, gate, up, down, gate_bias, up_bias, down_bias, **options)
    check_routing("grouped_forward", x, top_k_index, top_k_weights)
    return _train(x, top_k_index, experts, width, recompute)


@register_fake("moe::grouped_forward")
def _(*args, **options):
    return _stacked_forward(*args, **options)[0]


@register_fake("moe::grouped_forward.list")
def _(*args, **options):
    return _listed_forward(*args, **options)[0]


@register_fake("moe_ext::_grouped_backward")
def _(grad, x, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row, gate_up, down, gate_up_bias, down_bias, **options):
    needs = Needs(options.pop("needs"))
    op, maps = "grouped_backward", (expert_offsets, row_to_slot, slot_to_row)
    experts, width = check_stacked(op, grad, gate_up, down, gate_up_bias, down_bias, **options)
    check_saved(op, grad, x, top_k_weights, pre_act, maps, experts, width, needs)
    shapes = {
        Needs.HIDDEN_STATES: grad.shape,
        Needs.GATE_UP: gate_up.shape,
        Needs.DOWN: down.shape,
        Needs.GATE_UP_BIAS: (experts, width),
        Needs.DOWN_BIAS: (experts, grad.shape[1]),
    }
    results = {bit: grad.new_empty(size) for bit, size in shapes.items() if bit in needs}
    if Needs.TOP_K_WEIGHTS in needs:
        results[Needs.TOP_K_WEIGHTS] = top_k_weights.new_empty(top_k_weights.shape)
    return [results[bit] for bit in sorted(results)]


@register_fake("moe_ext::_grouped_backward.list")
def _(grad, x, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row, gate, up, down, gate_bias, up_bias, down_bias, **options):
    needs = Needs(options.pop("needs"))
    op, maps = "grouped_backward", (expert_offsets, row_to_slot, slot_to_row)
    experts, width = check_listed(op, grad, gate, up, down, gate_bias, up_bias, down_bias, **options)
    check_saved(op, grad, x, top_k_weights, pre_act, maps, experts, width, needs)
    results = []
    if Needs.HIDDEN_STATES in needs:
        results.append(grad.new_empty(grad.shape))
    if Needs.TOP_K_WEIGHTS in needs:
        results.append(top_k_weights.new_empty(top_k_weights.shape))
    hidden, inner = grad.shape[1], up[0].shape[0]
    for bit, size in (
        (Needs.GATE_UP, (inner, hidden)), (Needs.UP, (inner, hidden)), (Needs.DOWN, (hidden, inner)),
        (Needs.GATE_UP_BIAS, (inner,)), (Needs.UP_BIAS, (inner,)), (Needs.DOWN_BIAS, (hidden,)),
    ):  # fmt: skip
        if bit in needs:
            results.extend(grad.new_empty(size) for _ in up)
    return results

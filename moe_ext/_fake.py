"""Shapes and dtypes of every op without computing it (for torch.compile, export and the meta device). One function per schema."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._needs import Needs


def _devices(args: Any) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield str(arg.device)
        elif isinstance(arg, (list, tuple)):
            yield from _devices(arg)


def register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """torch.library.register_fake, and one check: a single tensor on the meta device (an offloaded weight) sends a whole call
    here, where the result would be memory that nobody fills."""

    def register(fake: Callable[..., Any]) -> None:
        @functools.wraps(fake)
        def checked(*args: Any, **options: Any) -> Any:
            devices = sorted(set(_devices(args)))
            if len(devices) > 1:
                op = name.partition(".")[0]
                raise RuntimeError(f"{op}: the tensors are on different devices: {', '.join(devices)}; move them to one of these")
            return fake(*args, **options)

        torch.library.register_fake(name)(checked)

    return register


@register_fake("moe::sort_by_expert")
def _(top_k_index, num_experts):
    slots = top_k_index.shape[0] * top_k_index.shape[1]
    ints = [top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, slots, slots)]
    return tuple(ints)


@register_fake("moe::permute")
def _(x, row_to_slot, slot_to_row, top_k):
    return x.new_empty(row_to_slot.shape[0], x.shape[1])


@register_fake("moe::unpermute")
def _(rows, row_to_slot, slot_to_row, top_k, top_k_weights=None):
    tokens = row_to_slot.shape[0] // top_k if top_k_weights is None else top_k_weights.shape[0]
    return rows.new_empty(tokens, rows.shape[1])


@register_fake("moe::unpermute_backward")
def _(grad, rows, row_to_slot, top_k_weights):
    return rows.new_empty(rows.shape), top_k_weights.new_empty(top_k_weights.shape)


@register_fake("moe::grouped_mm")
def _(x, weight, expert_offsets, bias=None, *, transposed=False):
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@register_fake("moe::grouped_mm.list")
def _(x, weight, expert_offsets, bias=None, *, transposed=False):
    return x.new_empty(x.shape[0], weight[0].shape[1 if transposed else 0])


@register_fake("moe::grouped_mm_wgrad")
def _(a, b, expert_offsets):
    return a.new_empty(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1])


@register_fake("moe::grouped_mm_wgrad.list")
def _(a, b, expert_offsets):
    return [a.new_empty(a.shape[1], b.shape[1]) for _ in range(expert_offsets.shape[0] - 1)]


@register_fake("moe::grouped_bias_grad")
def _(grad, expert_offsets):
    return grad.new_empty(expert_offsets.shape[0] - 1, grad.shape[1])


@register_fake("moe::gated_activation")
def _(pre_act, *, activation="silu", gated=True, interleaved=False, alpha=None, limit=None):
    return pre_act.new_empty(pre_act.shape[0], pre_act.shape[1] // (2 if gated else 1))


@register_fake("moe::gated_activation_backward")
def _(grad, pre_act, *, activation="silu", gated=True, interleaved=False, alpha=None, limit=None):
    return pre_act.new_empty(pre_act.shape)


def _train(hidden_states: Tensor, top_k_index: Tensor, experts: int, width: int, recompute: bool) -> tuple[Tensor, ...]:
    """out, pre_act, expert_offsets, row_to_slot, slot_to_row."""
    slots = top_k_index.shape[0] * top_k_index.shape[1]
    ints = [hidden_states.new_empty(n, dtype=torch.int32) for n in (experts + 1, slots, slots)]
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(0 if recompute else slots, width), *ints


@register_fake("moe::grouped_forward")
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias=None, down_bias=None, **options):
    return hidden_states.new_empty(hidden_states.shape)


@register_fake("moe::grouped_forward.list")
def _(hidden_states, top_k_index, top_k_weights, gate, up, down, gate_bias=None, up_bias=None, down_bias=None, **options):
    return hidden_states.new_empty(hidden_states.shape)


@register_fake("moe::_grouped_forward_train")
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias=None, down_bias=None, **options):
    width = gate_up_proj.shape[2 if options.get("transposed", False) else 1]
    return _train(hidden_states, top_k_index, gate_up_proj.shape[0], width, options.get("recompute", False))


@register_fake("moe::_grouped_forward_train.list")
def _(hidden_states, top_k_index, top_k_weights, gate, up, down, gate_bias=None, up_bias=None, down_bias=None, **options):
    width = up[0].shape[0] * (2 if options.get("gated", True) else 1)
    return _train(hidden_states, top_k_index, len(up), width, options.get("recompute", False))


@register_fake("moe::_grouped_backward")
def _(grad, x, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row, gate_up, down, gate_up_bias, down_bias, **options):
    needs = Needs(options["needs"])
    experts = gate_up.shape[0]
    shapes = {
        Needs.HIDDEN_STATES: grad.shape,
        Needs.GATE_UP: gate_up.shape,
        Needs.DOWN: down.shape,
        Needs.GATE_UP_BIAS: (experts, gate_up.shape[2 if options["transposed"] else 1]),
        Needs.DOWN_BIAS: (experts, grad.shape[1]),
    }
    results = {bit: grad.new_empty(size) for bit, size in shapes.items() if bit in needs}
    if Needs.TOP_K_WEIGHTS in needs:
        results[Needs.TOP_K_WEIGHTS] = top_k_weights.new_empty(top_k_weights.shape)
    return [results[bit] for bit in sorted(results)]


@register_fake("moe::_grouped_backward.list")
def _(grad, x, top_k_weights, pre_act, expert_offsets, row_to_slot, slot_to_row, gate, up, down, gate_bias, up_bias, down_bias, **options):
    needs = Needs(options["needs"])
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

"""Blocks that hold one module per expert (transformers 4.57): the block's forward is replaced on the instance.

    logits = gate(x);  top_k_weights, top_k_index = topk(softmax(logits));  [renormalise];  out = experts(x), logits

The block's own gate is called; the weights of the experts are gathered at each call as they are, without stacking, after a look
at every expert: anything but plain linear layers (adapters, hooks, quantization, offloading) sends the call to the block's own
forward. One difference to the loop over experts: an expert without tokens gets a gradient of zeros, where the loop leaves None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..experts import ExpertSpec, ExpertWeights
from .detect import OUR_FORWARD
from .fallback import DISABLE_VARIABLE, autocast_is_on, disabled_by_environment, log_once


class BlockForward:
    """The forward of one block. It holds the block, not its weights, and is copied and pickled with it."""

    def __init__(self, block: nn.Module, projections: tuple[str, str, str], spec: ExpertSpec, returns_logits: bool, proven: bool) -> None:
        self.moe_ext_block = block
        self.projections = projections
        self.spec = spec
        self.returns_logits = returns_logits
        self.proven = proven
        self.active = True

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = self.moe_ext_block
        if self.active:
            reason = (
                f"{DISABLE_VARIABLE} is set"
                if disabled_by_environment()
                else "it is called with more arguments"
                if args or kwargs
                else None
            )
            weights = reason or read_weights(block, self.projections, hidden_states)
            if isinstance(weights, ExpertWeights):
                return run(block, hidden_states, weights, self.spec, self.returns_logits)
            log_once(f"{type(block).__name__} runs its own forward: {weights}")
        return type(block).forward(block, hidden_states, *args, **kwargs)


def run(block: nn.Module, hidden_states: Tensor, weights: ExpertWeights, spec: ExpertSpec, returns_logits: bool) -> Any:
    """What the block computes, with its return contract: `(out, router_logits)` or `out`."""
    x, router_logits, top_k_weights, top_k_index = route(block, hidden_states)
    out = functional.grouped_experts(x, top_k_index, top_k_weights, weights, spec).reshape(hidden_states.shape)
    out = out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)  # autocast computes in its own dtype
    return (out, router_logits) if returns_logits else out


def route(block: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hidden_states [.., H]` to x `[T,H]`, router logits `[T,E]`, top_k_weights and top_k_index `[T,K]`, by the block's settings now.

    In training a block with `jitter_noise` multiplies its input, for the gate and for the experts, with noise from the global
    generator. Without the attribute `norm_topk_prob` the weights are renormalised.
    """
    noise = draw_noise(block, hidden_states)
    if noise is not None:
        hidden_states = hidden_states * noise
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    router_logits = block.gate(x)
    top_k_weights, top_k_index = torch.topk(F.softmax(router_logits, dim=-1, dtype=torch.float), block.top_k, dim=-1)
    if getattr(block, "norm_topk_prob", True):
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
    return x, router_logits, top_k_weights.to(x.dtype), top_k_index


def draw_noise(block: nn.Module, hidden_states: Tensor) -> Tensor | None:
    """The factors of a block with jitter in training, from the global generator; None for all others."""
    jitter = getattr(block, "jitter_noise", 0)
    return torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter) if block.training and jitter > 0 else None


def read_weights(block: nn.Module, projections: tuple[str, str, str], hidden_states: Tensor | None = None) -> ExpertWeights | str:
    """The tensors of the experts at this moment, or the reason why they must be left to the block's own forward.

    Runs once per forward over all experts, so it goes through the dictionaries of the modules: attribute access costs ten times more.
    """
    linears: tuple[list[nn.Module], ...] = ([], [], [])
    for i, expert in enumerate(block.experts._modules.values()):
        assert expert is not None
        if _is_hooked(expert):
            return f"experts.{i} has hooks or a forward of its own"
        children = expert._modules
        for child in children.values():
            if child is not None and _is_hooked(child):
                return f"a part of experts.{i} ({type(child).__name__}) has hooks or a forward of its own"
        for found, name in zip(linears, projections, strict=True):
            linear = children.get(name)
            if type(linear) is not nn.Linear:
                return f"experts.{i}.{name} is a {type(linear).__name__}, not a plain nn.Linear"
            found.append(linear)
    weights, biases = ([[m._parameters.get(kind) for m in found] for found in linears] for kind in ("weight", "bias"))
    reason = _unusable([t for found in weights for t in found], hidden_states)
    if reason is not None:
        return reason
    gate_bias, up_bias, down_bias = (None if found[0] is None else found for found in biases)
    return ExpertWeights(
        gate_proj=weights[0], up_proj=weights[1], down_proj=weights[2], gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias
    )  # fmt: skip


def _is_hooked(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or ("forward" in state and getattr(state["forward"], "__func__", None) is not type(module).forward)
    )  # fmt: skip


def _unusable(tensors: list[Any], hidden_states: Tensor | None) -> str | None:
    like = tensors[0] if hidden_states is None else hidden_states
    if like is None:
        return "a weight is missing"
    device, dtype = like.device, like.dtype
    any_dtype = autocast_is_on(device)
    for t in tensors:
        if t is None:
            return "a weight is missing or is computed by a parametrization"
        if t.device != device or (t.dtype != dtype and not any_dtype) or not t.is_floating_point():
            return f"a weight is {t.dtype} on {t.device}, where {dtype} on {device} is needed"
    return None


# ------------------------------------------------------------------------------------------------------------------------ patching
def forward_of(block: nn.Module) -> BlockForward | None:
    """The forward that `apply` gave this block, also when something else has been wrapped around it since."""
    return block.__dict__.get(OUR_FORWARD)


def is_enabled(block: nn.Module) -> bool:
    ours = forward_of(block)
    return ours is not None and ours.active


def apply(block: nn.Module, forward: BlockForward) -> None:
    """Puts `forward` on the block; where ours is there already, below other wrappers or not, that one is switched on again."""
    ours = forward_of(block)
    if ours is not None:
        ours.__dict__.update(forward.__dict__)
        return
    block.__dict__[OUR_FORWARD] = block.__dict__["forward"] = forward


def revert(block: nn.Module) -> bool:
    """Takes back `apply`, and nothing else. A wrapper that was put around our forward since then stays, and finds it inert."""
    ours = forward_of(block)
    if ours is None:
        return False
    was_active, ours.active = ours.active, False
    if block.__dict__.get("forward") is ours:
        del block.__dict__["forward"], block.__dict__[OUR_FORWARD]
    return was_active

"""The formula of an expert layer in plain PyTorch: readable, differentiable, in any dtype. It is the oracle of every test.

    out[t] = sum_k w[t,k] * down_e( act(gate_e x[t]) * up_e x[t] ),   e = top_k_index[t,k]

In float64 it is the truth that errors are measured against. In the dtype of the inputs it is "plain PyTorch", whose error is the
yardstick. It loops over the experts that have tokens, so it is slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .experts import ExpertSpec, ExpertWeights, split_gate_up


def activation(pre_act: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    """Applies the activation of `spec`.

    - silu, gelu (erf), gelu_tanh, relu, `relu2 = relu(x)^2`: `act(gate) * up`, or `act(x)` if not gated.
    - swigluoai (gpt-oss): `gate * sigmoid(alpha * gate) * (up + 1)`.
    - `limit` clamps first: `gate <= limit`, `-limit <= up <= limit` (gpt-oss, DeepSeek-V4).
    - `gate_fn` replaces all of it.

    Args:
        pre_act: `[S, 2I]`, or `[S, I]` if not gated.
        spec: How the experts compute.

    Returns:
        `[S, I]`.
    """
    if spec.gate_fn is not None:
        return spec.gate_fn(pre_act)
    if not spec.gated:
        return _activate(pre_act, spec)
    gate, up = split_gate_up(pre_act, spec.interleaved)
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    if spec.activation == "swigluoai":
        up = up + 1
    return _activate(gate, spec) * up


def _activate(x: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    match spec.activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "swigluoai":
            return x * torch.sigmoid(x * spec.alpha)
    raise ValueError(f"activation={spec.activation!r} is not known")


def grouped_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
) -> torch.Tensor:
    """Computes an expert layer by its formula, expert by expert. A slot whose id is outside `[0, E)` adds nothing.

    Weights are cast to the dtype of hidden_states one expert at a time, so the float64 truth of bfloat16 weights needs no float64 copy
    of all of them.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]`, int32 or int64.
        top_k_weights: `[T, K]`.
        weights: The tensors of the experts.
        spec: How the experts compute.

    Returns:
        `[T, H]`, in the dtype of hidden_states.
    """
    dtype = hidden_states.dtype
    out = torch.zeros_like(hidden_states)
    for e in range(weights.num_experts):
        token, k = torch.where(top_k_index == e)
        if token.numel() == 0:
            continue
        w = weights.expert(e, spec).to(dtype)
        x = hidden_states[token]
        pre_act = F.linear(x, w.up, w.up_bias)
        if w.gate is not None:
            gate = F.linear(x, w.gate, w.gate_bias)
            pre_act = torch.stack((gate, pre_act), -1).flatten(-2) if spec.interleaved else torch.cat((gate, pre_act), -1)
        y = F.linear(activation(pre_act, spec), w.down, w.down_bias)
        if spec.post_norm is not None:
            y = spec.post_norm(y)
        out = out.index_add(0, token, (y * top_k_weights[token, k, None]).to(dtype))
    return out

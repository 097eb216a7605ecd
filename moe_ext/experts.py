"""What a set of experts is (`ExpertSpec`) and the tensors it computes with (`ExpertWeights`): plain data.

Shapes: E experts, H hidden size, I intermediate size. Stacked weights are `[E, 2I, H]` and `[E, H, I]`, or transposed
`[E, H, 2I]` and `[E, I, H]`; per-expert weights are lists of E matrices `[I, H]`, `[I, H]`, `[H, I]`. Nothing here imports
the compiled library or any model library: this is the vocabulary that all other modules meet at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Activations the kernels know, by the names `transformers` and PyTorch use; formulas in `moe_ext.reference.activation`.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")


@dataclass(frozen=True)
class ExpertSpec:
    """How one set of experts computes; says nothing about sizes (those are read from the tensors).

    activation: one of `ACTIVATIONS`.
    gated: `activation(gate) * up` with a gate projection, else `activation(up)`.
    transposed: stacked weights are `[E, in, out]` instead of `[E, out, in]`.
    interleaved: gate and up alternate (g0, u0, g1, u1, ...) along the 2I dimension instead of `[gate | up]`.
    alpha: the factor inside the sigmoid of "swigluoai".
    limit: clamps `gate <= limit` and `-limit <= up <= limit` before the activation.
    gate_fn: replaces activation and gating: maps the pre-activation `[S, 2I]` (or `[S, I]`) to `[S, I]`. Composed path only.
    post_norm: applied to each expert's output row `[S, H]` before the routing weight. Composed path only.
    recompute: training keeps hidden_states and the routing only and forms the pre-activation again in its backward: 2H bytes per token
    in bfloat16 instead of 2H + 4KI, for one more up projection. Fused op only; the composed path keeps what autograd keeps.
    """

    activation: str = "silu"
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None
    gate_fn: Callable[[torch.Tensor], torch.Tensor] | None = None
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation, self.gated, self.interleaved, self.alpha, self.limit)

    @property
    def fusable(self) -> bool:
        """Whether the fused op computes this, or only the composed path."""
        return self.gate_fn is None and self.post_norm is None


def check_activation(activation: str, gated: bool, interleaved: bool, alpha: float | None, limit: float | None) -> None:
    """Raises ValueError, with the values, for a combination that no formula is defined for."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; choose one of {', '.join(ACTIVATIONS)}")
    if activation == "swigluoai":
        if not gated:
            raise ValueError("activation='swigluoai' multiplies by (up + 1): it needs gated=True")
        if alpha is None:
            raise ValueError("activation='swigluoai' needs alpha (gpt-oss uses 1.702)")
    elif alpha is not None:
        raise ValueError(f"alpha={alpha} has no meaning for activation={activation!r}; only 'swigluoai' has it")
    if limit is not None and not (gated and limit > 0):
        raise ValueError(f"limit={limit} needs gated=True and a positive value, got gated={gated}")
    if interleaved and not gated:
        raise ValueError("interleaved=True means gate and up alternate: it needs gated=True")


class Projection(ABC):
    """Stands for the E matrices `[out, in]` of one projection where they are not plain tensors: quantized, or with adapters on them.

    Lives for one call: whoever reads the weights makes it, with the tensors as they are at that moment. Composed path only.
    """

    @abstractmethod
    def __len__(self) -> int:
        """E."""

    @abstractmethod
    def grouped_mm(self, rows: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
        """`rows [S, in]`, sorted by expert, to `[S, out]` in the dtype of rows; differentiable as `moe_ext.ops.grouped_mm` is."""

    @abstractmethod
    def __getitem__(self, e: int) -> torch.Tensor:
        """The matrix `[out, in]` of expert e that `grouped_mm` multiplies with, differentiable too: what the formula reads."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """The tensors it consists of."""


@dataclass
class ExpertWeights:
    """The tensors of one set of experts, read at call time; either stacked or one tensor per expert.

    Stacked: `gate_up_proj` `[E, 2I, H]` (ungated: `[E, I, H]`) and `down_proj` `[E, H, I]`, or both transposed; biases
    `gate_up_bias` `[E, 2I]`, `down_bias` `[E, H]`.
    Per expert: `gate_proj` (None when ungated), `up_proj`, `down_proj` as sequences of E matrices `[out, in]`; biases
    `gate_bias`, `up_bias`, `down_bias` as sequences of E vectors. Sequences are used as they are: no stack, no copy.
    In place of a stack or a sequence of matrices there may be a `Projection`, whose matrices are `[out, in]` in either form.
    """

    gate_up_proj: torch.Tensor | Projection | None = None
    down_proj: torch.Tensor | Sequence[torch.Tensor] | Projection | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | Sequence[torch.Tensor] | None = None
    gate_proj: Sequence[torch.Tensor] | Projection | None = None
    up_proj: Sequence[torch.Tensor] | Projection | None = None
    gate_bias: Sequence[torch.Tensor] | None = None
    up_bias: Sequence[torch.Tensor] | None = None

    @property
    def stacked(self) -> bool:
        return self.gate_up_proj is not None

    @property
    def fusable(self) -> bool:
        """Whether the fused op can read them: all are plain tensors."""
        return not any(isinstance(value, Projection) for value in vars(self).values())

    @property
    def num_experts(self) -> int:
        assert self.down_proj is not None
        return len(self.down_proj)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, in a fixed order."""
        found: list[torch.Tensor] = []
        for value in vars(self).values():
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, Projection):
                found.extend(value.tensors())
            elif value is not None:
                found.extend(value)
        return found

    def expert(self, e: int, spec: ExpertSpec) -> dict[str, torch.Tensor | None]:
        """Views of expert `e` in one canonical form: gate `[I,H]` or None, up `[I,H]`, down `[H,I]`, and their biases or None."""
        assert self.down_proj is not None
        if not self.stacked:
            assert self.up_proj is not None

            def pick(seq: Sequence[torch.Tensor] | Projection | torch.Tensor | None) -> torch.Tensor | None:
                return None if seq is None else seq[e]

            gate = pick(self.gate_proj) if spec.gated else None
            return {
                "gate": gate, "up": self.up_proj[e], "down": self.down_proj[e],
                "gate_bias": pick(self.gate_bias), "up_bias": pick(self.up_bias), "down_bias": pick(self.down_bias),
            }  # fmt: skip
        assert self.gate_up_proj is not None
        gate_up, down = self.gate_up_proj[e], self.down_proj[e]
        if spec.transposed:
            gate_up = gate_up if isinstance(self.gate_up_proj, Projection) else gate_up.T
            down = down if isinstance(self.down_proj, Projection) else down.T
        bias = None if self.gate_up_bias is None else self.gate_up_bias[e]
        down_bias = None if self.down_bias is None else self.down_bias[e]
        if not spec.gated:
            return {"gate": None, "up": gate_up, "down": down, "gate_bias": None, "up_bias": bias, "down_bias": down_bias}
        gate, up = split_gate_up(gate_up, spec.interleaved, dim=0)
        gate_bias, up_bias = (None, None) if bias is None else split_gate_up(bias, spec.interleaved, dim=0)
        return {"gate": gate, "up": up, "down": down, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}


def split_gate_up(x: torch.Tensor, interleaved: bool, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate half and the up half of a 2I dimension, as views."""
    if interleaved:
        x = x.unflatten(dim, (-1, 2))
        dim = dim if dim < 0 else dim + 1
        return x.select(dim, 0), x.select(dim, 1)
    gate, up = x.chunk(2, dim=dim)
    return gate, up

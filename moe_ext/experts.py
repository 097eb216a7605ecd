"""What a set of experts is (`ExpertSpec`) and the tensors it computes with (`ExpertWeights`): plain data.

Shapes: E experts, H hidden size, I intermediate size. Stacked weights are `[E, 2I, H]` and `[E, H, I]`, or transposed
`[E, H, 2I]` and `[E, I, H]`; per-expert weights are lists of E matrices `[I, H]`, `[I, H]`, `[H, I]`. Nothing here imports
the compiled library or any model library: this is the vocabulary that all other modules meet at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

#: Activations the kernels know, by the names `transformers` and PyTorch use; formulas in `moe_ext.reference.activation`.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")


@dataclass(frozen=True)
class ExpertSpec:
    """How a set of experts computes. Sizes are not part of it: they are read from the tensors.

    Attributes:
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "swigluoai".
        gated: Whether the experts compute `act(gate) * up`, or only `act(up)`.
        transposed: Whether stacked weights are `[E, in, out]` instead of `[E, out, in]`.
        interleaved: Whether gate and up alternate along 2I (g0, u0, g1, u1, ...). Otherwise the first half is gate.
        alpha: The factor of "swigluoai"; required there, not allowed elsewhere.
        limit: Clamps `gate <= limit` and `-limit <= up <= limit` before the activation.
        gate_fn: Replaces activation and gating: maps `[S, 2I]` (or `[S, I]`) to `[S, I]`. Composed path only.
        post_norm: Is applied to each expert's output row `[S, H]` before the routing weight. Composed path only.
        recompute: Whether training keeps only the hidden states and the routing, and computes the up projection again in its backward:
            2H bytes per token in bfloat16 instead of 2H + 4KI, without the routing. Fused op only.

    Raises:
        ValueError: If an option has no meaning for the activation.
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
        """Whether the fused op computes this. Otherwise only the composed path does."""
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
    """Stands for the E matrices `[out, in]` of one projection that are not plain tensors: quantized, or with adapters on them.

    It lives for one call: whoever reads the weights makes it, from the tensors as they are at that moment. Composed path only.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Returns E."""

    @abstractmethod
    def grouped_mm(self, rows: torch.Tensor, expert_offsets: torch.Tensor) -> torch.Tensor:
        """Multiplies the rows of each expert with its matrix, differentiably, as `moe_ext.ops.grouped_mm` does.

        Args:
            rows: `[S, in]`, sorted by expert.
            expert_offsets: `[E+1]`, from `sort_by_expert`.

        Returns:
            `[S, out]`, in the dtype of rows.
        """

    @abstractmethod
    def __getitem__(self, e: int) -> torch.Tensor:
        """Returns the matrix `[out, in]` of expert e that `grouped_mm` multiplies with, differentiably."""

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors it consists of."""


class Expert(NamedTuple):
    """The matrices and biases of one expert, in one form whatever the layout.

    Attributes:
        gate: `[I, H]`. None if not gated.
        up: `[I, H]`.
        down: `[H, I]`.
        gate_bias: `[I]`, or None.
        up_bias: `[I]`, or None.
        down_bias: `[H]`, or None.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Expert:
        """Returns the expert in another dtype."""
        return Expert(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


_Weights = TypeVar("_Weights", bound="ExpertWeights")


class ExpertWeights:
    """The tensors of a set of experts, read at call time: `StackedWeights`, or `ListedWeights` with one tensor per expert.

    Calling it makes the one that has the fields: `ExpertWeights(gate_up_proj=..., down_proj=...)` is stacked,
    `ExpertWeights(gate_proj=..., up_proj=..., down_proj=...)` is listed.
    """

    down_proj: Any
    down_bias: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is ExpertWeights:
            return object.__new__(StackedWeights if args or "gate_up_proj" in kwargs else ListedWeights)
        return object.__new__(cls)

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds the matrices of all experts."""
        return isinstance(self, StackedWeights)

    @property
    def fusable(self) -> bool:
        """Whether the fused op can read them, because all are plain tensors."""
        return not any(isinstance(value, Projection) for value in vars(self).values())

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.down_proj)

    def tensors(self) -> list[torch.Tensor]:
        """Returns every tensor, in a fixed order."""
        found: list[torch.Tensor] = []
        for value in vars(self).values():
            if isinstance(value, torch.Tensor):
                found.append(value)
            elif isinstance(value, Projection):
                found.extend(value.tensors())
            elif value is not None:
                found.extend(value)
        return found

    def mapped(self: _Weights, function: Callable[[str, Any], Any]) -> _Weights:
        """Returns weights of the same kind with other values.

        Args:
            function: Is called with the name and the value of each field that is not None.
        """
        return type(self)(**{name: None if value is None else function(name, value) for name, value in vars(self).items()})

    def expert(self, e: int, spec: ExpertSpec) -> Expert:
        """Returns views of one expert.

        Args:
            e: The expert.
            spec: How the weights are laid out.
        """
        raise TypeError(f"{type(self).__name__} is neither StackedWeights nor ListedWeights")


@dataclass
class StackedWeights(ExpertWeights):
    """One tensor for each projection of all experts.

    A `Projection` may take the place of a stack; its matrices are `[out, in]`.

    Attributes:
        gate_up_proj: `[E, 2I, H]`, `[E, I, H]` if not gated, `[E, H, 2I]` if transposed.
        down_proj: `[E, H, I]`, `[E, I, H]` if transposed.
        gate_up_bias: `[E, 2I]`, or None.
        down_bias: `[E, H]`, or None.
    """

    gate_up_proj: torch.Tensor | Projection
    down_proj: torch.Tensor | Projection
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def expert(self, e: int, spec: ExpertSpec) -> Expert:
        gate_up, down = (
            proj[e].T if spec.transposed and isinstance(proj, torch.Tensor) else proj[e] for proj in (self.gate_up_proj, self.down_proj)
        )
        bias = None if self.gate_up_bias is None else self.gate_up_bias[e]
        down_bias = None if self.down_bias is None else self.down_bias[e]
        if not spec.gated:
            return Expert(None, gate_up, down, None, bias, down_bias)
        gate, up = split_gate_up(gate_up, spec.interleaved, dim=0)
        gate_bias, up_bias = (None, None) if bias is None else split_gate_up(bias, spec.interleaved, dim=0)
        return Expert(gate, up, down, gate_bias, up_bias, down_bias)


@dataclass
class ListedWeights(ExpertWeights):
    """One tensor for each projection of each expert. Sequences are used as they are, without a stack or a copy.

    A `Projection` may take the place of a sequence of matrices.

    Attributes:
        up_proj: E matrices `[I, H]`.
        down_proj: E matrices `[H, I]`.
        gate_proj: E matrices `[I, H]`. None if not gated.
        up_bias: E vectors `[I]`, or None.
        down_bias: E vectors `[H]`, or None.
        gate_bias: E vectors `[I]`, or None.
    """

    up_proj: Sequence[torch.Tensor] | Projection
    down_proj: Sequence[torch.Tensor] | Projection
    gate_proj: Sequence[torch.Tensor] | Projection | None = None
    up_bias: Sequence[torch.Tensor] | None = None
    down_bias: Sequence[torch.Tensor] | None = None
    gate_bias: Sequence[torch.Tensor] | None = None

    def expert(self, e: int, spec: ExpertSpec) -> Expert:
        gate_bias, up_bias, down_bias = (None if b is None else b[e] for b in (self.gate_bias, self.up_bias, self.down_bias))
        gate = self.gate(spec)
        return Expert(None if gate is None else gate[e], self.up_proj[e], self.down_proj[e], gate_bias, up_bias, down_bias)

    def gate(self, spec: ExpertSpec) -> Sequence[torch.Tensor] | Projection | None:
        """Returns the gate projections, or None if `spec` is not gated.

        Raises:
            ValueError: If `spec` is gated and there are none.
        """
        if spec.gated and self.gate_proj is None:
            raise ValueError("gate_proj is None, but the spec is gated; give gate_proj, or ExpertSpec(gated=False)")
        return self.gate_proj if spec.gated else None


def split_gate_up(x: torch.Tensor, interleaved: bool, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gate half and the up half of a 2I dimension, as views."""
    if interleaved:
        x = x.unflatten(dim, (-1, 2))
        dim = dim if dim < 0 else dim + 1
        return x.select(dim, 0), x.select(dim, 1)
    gate, up = x.chunk(2, dim=dim)
    return gate, up

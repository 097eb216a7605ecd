"""`GroupedExperts`: the experts of a Mixture-of-Experts layer as one `nn.Module`, for people who write their own model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .experts import ExpertSpec, StackedWeights
from .functional import grouped_experts


class GroupedExperts(nn.Module):
    """E experts of the form `down(act(gate x) * up x)`, weighted by routing weights that the caller's router gives.

    Parameters carry transformers' names, so checkpoints of stacked experts load by name:
    `gate_up_proj` `[E, 2I, H]` (with gated=False `up_proj` `[E, I, H]`), `down_proj` `[E, H, I]`, with transposed=True
    `[E, H, 2I]` and `[E, I, H]`; with bias=True `gate_up_proj_bias` `[E, 2I]` (`up_proj_bias`) and `down_proj_bias` `[E, H]`.
    interleaved=True means gate and up alternate along 2I. activation, alpha, limit, recompute: see `ExpertSpec`.

    Weights are initialised per expert as `nn.Linear` does: uniform in +-1/sqrt(fan_in).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        transposed: bool = False,
        interleaved: bool = False,
        bias: bool = False,
        alpha: float | None = None,
        limit: float | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}, expected at least 1")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.spec = ExpertSpec(activation, gated, transposed, interleaved, alpha, limit, recompute=recompute)
        self.up_name = "gate_up_proj" if gated else "up_proj"
        width = intermediate_size * (2 if gated else 1)
        for name, out_size, in_size in ((self.up_name, width, hidden_size), ("down_proj", hidden_size, intermediate_size)):
            shape = (num_experts, in_size, out_size) if transposed else (num_experts, out_size, in_size)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            vector = nn.Parameter(torch.empty(num_experts, out_size, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, fan_in in ((self.up_name, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def weights(self) -> StackedWeights:
        """The parameters as `StackedWeights`, read now."""
        return StackedWeights(
            gate_up_proj=getattr(self, self.up_name),
            down_proj=self.down_proj,
            gate_up_bias=getattr(self, f"{self.up_name}_bias"),
            down_bias=self.down_proj_bias,
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[..., H]`, top_k_index (int32 or int64) and top_k_weights `[..., K]` to `[..., H]`."""
        return grouped_experts(hidden_states, top_k_index, top_k_weights, self.weights(), self.spec)

    def extra_repr(self) -> str:
        s = self.spec
        flags = [f for f in ("transposed", "interleaved", "recompute") if getattr(s, f)] + ([] if s.gated else ["ungated"])
        return ", ".join(
            [f"experts={self.num_experts}", f"hidden={self.hidden_size}", f"intermediate={self.intermediate_size}", s.activation, *flags]
        )

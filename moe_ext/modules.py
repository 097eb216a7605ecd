"""`GroupedExperts`: the experts of a Mixture-of-Experts layer as one `nn.Module`, for a model of your own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .experts import ExpertSpec, StackedWeights
from .functional import grouped_experts


class GroupedExperts(nn.Module):
    """E experts `down(act(gate x) * up x)`, weighted by the routing weights that your router computes.

    The parameters have the names of transformers 5, so checkpoints of stacked experts load by name: `gate_up_proj [E, 2I, H]`
    (`up_proj [E, I, H]` if not gated) and `down_proj [E, H, I]`; if transposed `[E, H, 2I]` and `[E, I, H]`. With biases also
    `gate_up_proj_bias [E, 2I]` (`up_proj_bias [E, I]`) and `down_proj_bias [E, H]`.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "swigluoai".
        gated: Whether the experts compute `act(gate) * up`, or only `act(up)`.
        transposed: Whether the weights are `[E, in, out]`.
        interleaved: Whether gate and up alternate along 2I.
        bias: Whether both projections have biases.
        alpha: The factor of "swigluoai"; required there, not allowed elsewhere.
        limit: Clamps `gate <= limit` and `-limit <= up <= limit` before the activation.
        recompute: Whether training keeps less memory and computes the up projection twice; see `ExpertSpec`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If a size is less than 1, or if an option has no meaning for the activation.
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
        """Initialises each expert as `nn.Linear` does: uniform in +-1/sqrt(inputs)."""
        for name, fan_in in ((self.up_name, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def weights(self) -> StackedWeights:
        """Returns the parameters as they are now."""
        return StackedWeights(
            gate_up_proj=getattr(self, self.up_name),
            down_proj=self.down_proj,
            gate_up_bias=getattr(self, f"{self.up_name}_bias"),
            down_bias=self.down_proj_bias,
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the layer.

        Args:
            hidden_states: `[..., H]`.
            top_k_index: `[..., K]`, int32 or int64. An id outside `[0, num_experts)` drops its slot.
            top_k_weights: `[..., K]`, any float dtype.

        Returns:
            `[..., H]`, in the dtype of hidden_states.

        Raises:
            RuntimeError: If the tensors do not fit.
        """
        if torch.jit.is_scripting():
            return self._scripted(hidden_states, top_k_index, top_k_weights)
        else:  # TorchScript compiles what follows a return, but no branch that it does not take
            return grouped_experts(hidden_states, top_k_index, top_k_weights, self.weights(), self.spec)

    def __prepare_scriptable__(self) -> GroupedExperts:
        """`torch.jit.script` calls this first. It knows no ExpertSpec, so its values are written down in types that it knows."""
        s = self.spec
        if not s.fusable:
            raise ValueError("torch.jit.script cannot compile a gate_fn or a post_norm; without them, GroupedExperts is one op")
        self._script_options = (s.activation, s.gated, s.transposed, s.interleaved, s.alpha, s.limit, s.recompute)
        return self

    def _scripted(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hasattr(self, "gate_up_proj"):
            up_proj, up_bias = self.gate_up_proj, self.gate_up_proj_bias
        else:
            up_proj, up_bias = self.up_proj, self.up_proj_bias
        activation, gated, transposed, interleaved, alpha, limit, recompute = self._script_options
        out = torch.ops.moe.grouped_forward(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            up_proj, self.down_proj, up_bias, self.down_proj_bias,
            activation=activation, gated=gated, transposed=transposed, interleaved=interleaved, alpha=alpha, limit=limit,
            recompute=recompute,
        )  # fmt: skip
        return out.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        s = self.spec
        flags = [f for f in ("transposed", "interleaved", "recompute") if getattr(s, f)] + ([] if s.gated else ["ungated"])
        return ", ".join(
            [f"experts={self.num_experts}", f"hidden={self.hidden_size}", f"intermediate={self.intermediate_size}", s.activation, *flags]
        )

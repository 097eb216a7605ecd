"""Reading the weights of experts that are stacked in parameters of a module, `[E, ...]`: at each call, as they are then."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...experts import ListedWeights, StackedWeights
from ..usable import Refused, require_usable


@dataclass(frozen=True)
class StackedReader:
    """`gate_up` `[E, 2I, H]` and `down` `[E, H, I]`, or both transposed, by their names (dotted below the module), and their biases."""

    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None

    def read(self, module: nn.Module, like: Tensor | None = None) -> StackedWeights:
        """Raises Refused where the ops cannot compute `like` with them now."""
        gate_up, down = _tensor(module, self.gate_up), _tensor(module, self.down)
        gate_up_bias, down_bias = (None if name is None else _tensor(module, name) for name in (self.gate_up_bias, self.down_bias))
        if gate_up.shape[0] != down.shape[0]:  # rows that no expert uses: room for experts that compute nothing
            gate_up = gate_up[: down.shape[0]]
        weights = StackedWeights(gate_up, down, gate_up_bias, down_bias)
        require_usable(weights.tensors(), like)
        return weights


@dataclass(frozen=True)
class SeparateReader:
    """gate, up and down as three parameters `[E, ., .]`, or flattened `[E * ., .]` where `experts` is given.

    `transposed` says of each, in the order gate, up, down, whether its matrices are `[in, out]`.
    """

    projections: tuple[str, str, str]
    transposed: tuple[bool, bool, bool]
    experts: int | None = None

    def read(self, module: nn.Module, like: Tensor | None = None) -> ListedWeights:
        """Raises Refused where the ops cannot compute `like` with them now."""
        gate, up, down = (
            self._matrices(_tensor(module, name), transposed, like)
            for name, transposed in zip(self.projections, self.transposed, strict=True)
        )
        return ListedWeights(gate_proj=gate, up_proj=up, down_proj=down)

    def _matrices(self, stack: Tensor, transposed: bool, like: Tensor | None) -> list[Tensor]:
        require_usable([stack], like)
        stack = stack if self.experts is None else stack.view(self.experts, -1, stack.shape[-1])
        return list((stack.mT if transposed else stack).unbind())


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    t = owner._parameters.get(last)
    t = t if t is not None else getattr(owner, last, None)  # what a parametrization computes
    if t is None:
        raise Refused(f"{name} is missing")
    return t


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that hold one matrix or vector per expert: 3-D and 2-D ones of the module and of its own children."""
    found = {name: p for name, p in module._parameters.items() if p is not None and p.dim() in (2, 3)}
    for child_name, child in module._modules.items():
        if child is not None and not type(child).__module__.startswith("torch.nn."):
            found |= {f"{child_name}.{name}": p for name, p in child._parameters.items() if p is not None and p.dim() in (2, 3)}
    return found

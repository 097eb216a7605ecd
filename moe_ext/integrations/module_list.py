"""Reading the weights of experts that are modules of their own, in a ModuleList or ModuleDict: as they are, without stacking.

Everything may change between two calls (adapters, quantization, hooks, offloading), so everything is looked at in every call. For
plain linear layers that look is a comparison with the last one, done by the interpreter's own loops (`_Snapshot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, contains, is_, is_not
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import ExpertWeights
from . import bitsandbytes, peft
from .parameters import unusable

#: gate, up and down projection of one expert, by the names that model code uses; other names are told apart by the proof.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")


@dataclass
class Listed:
    """The projections gate (None when ungated), up and down of each expert in the child `container` ("" for the module itself)."""

    container: str
    projections: tuple[str | None, str, str]
    _snapshot: _Snapshot | None = field(default=None, repr=False, compare=False)

    layout = "module list"

    def read(self, module: nn.Module, like: Tensor | None = None) -> ExpertWeights | str:
        """The tensors of the experts at this moment, or the reason why they must be left to the module's own code."""
        container = container_of(module, self.container)
        compiling = torch.compiler.is_compiling()  # a compiler guards what it has seen by itself
        if not compiling and self._snapshot is not None:
            weights = self._snapshot.weights(container, like)
            if weights is not None:
                return weights
        found = _look(container, self.projections)
        if isinstance(found, str):
            return found
        if all(type(linear) is nn.Linear for linears in found if linears for linear in linears):
            if not compiling:
                self._snapshot = _Snapshot(container, found)
            return _plain(found, like)
        return _with_projections(found, like)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_snapshot": None}  # a copy has modules of its own


def container_of(module: nn.Module, name: str) -> nn.Module:
    return module._modules[name] if name else module  # type: ignore[return-value]


def members(container: nn.Module) -> list[nn.Module]:
    """The experts with weights; a list may also hold an activation, a dropout, or experts that return their input."""
    return [m for m in container._modules.values() if m is not None and (m._modules or m._parameters)]


def identities(container: nn.Module) -> int:
    return sum(type(m) is nn.Identity for m in container._modules.values())


_Linears = tuple[list[nn.Module] | None, list[nn.Module], list[nn.Module]]


def _look(container: nn.Module, projections: tuple[str | None, str, str]) -> _Linears | str:
    """The modules of each projection, or what stands against calling them together."""
    found: list[list[nn.Module] | None] = [None if name is None else [] for name in projections]
    for name, expert in container._modules.items():
        assert expert is not None
        if is_hooked(expert):
            return f"expert {name} has hooks or a forward of its own"
        children = expert._modules
        for child in children.values():
            if child is not None and is_hooked(child):
                return f"a part of expert {name} ({type(child).__name__}) has hooks or a forward of its own"
        if not children:
            continue  # no expert, or one that returns its input
        for linears, projection in zip(found, projections, strict=True):
            if linears is not None:
                linear = children.get(projection)  # type: ignore[arg-type]
                if linear is None:
                    return f"expert {name} has no {projection}"
                linears.append(linear)
    return tuple(found)  # type: ignore[return-value]


def is_hooked(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        or ("forward" in state and getattr(state["forward"], "__func__", None) is not type(module).forward)
    )  # fmt: skip


def _plain(found: _Linears, like: Tensor | None) -> ExpertWeights | str:
    weights = [None if linears is None else [m._parameters.get("weight") for m in linears] for linears in found]
    biases = [None if linears is None else [m._parameters.get("bias") for m in linears] for linears in found]
    every = [t for tensors in (*weights, *_present(biases)) if tensors is not None for t in tensors]
    if any(t is None for t in every):
        return "a weight is missing or is computed by a parametrization"
    return unusable(every, like) or _expert_weights(weights, _present(biases))  # type: ignore[arg-type]


def _expert_weights(weights: Sequence[Any], biases: Sequence[Any]) -> ExpertWeights:
    return ExpertWeights(
        gate_proj=weights[0], up_proj=weights[1], down_proj=weights[2],
        gate_bias=biases[0], up_bias=biases[1], down_bias=biases[2],
    )  # fmt: skip


def _present(biases: Sequence[list[Any] | None]) -> list[Any]:
    return [None if found is None or found[0] is None else found for found in biases]


def _with_projections(found: _Linears, like: Tensor | None) -> ExpertWeights | str:
    """Weights with adapters on them, in 4 bit, or both, each projection by itself."""
    weights: list[Any] = []
    biases: list[Any] = []
    for linears in found:
        one = (None, None) if linears is None else _projection(linears, like)
        if isinstance(one, str):
            return one
        weights.append(one[0])
        biases.append(one[1])
    return _expert_weights(weights, biases)


def _projection(linears: list[nn.Module], like: Tensor | None) -> tuple[Any, Any] | str:
    unwrapped = peft.unwrap(linears)
    if isinstance(unwrapped, str):
        return unwrapped
    base, adapters = unwrapped
    weight: Any
    if any(bitsandbytes.is_quantized(m) for m in base):
        weight = bitsandbytes.read(base, like)
        if isinstance(weight, str):
            return weight
    else:
        for m in base:
            if type(m) is not nn.Linear:
                return f"a projection is a {type(m).__name__}, not a plain nn.Linear"
        weight = [m._parameters.get("weight") for m in base]
        if any(t is None for t in weight):
            return "a weight is missing or is computed by a parametrization"
        reason = unusable(weight, like)
        if reason is not None:
            return reason
    biases = [m._parameters.get("bias") for m in base]
    present = sum(b is not None for b in biases)
    if present not in (0, len(biases)):
        return f"{present} of {len(biases)} experts have a bias"
    return weight if adapters is None else peft.project(weight, adapters), biases if present else None


class _Snapshot:
    """What the last look found, in a form in which "nothing has changed" is a few loops without bytecode.

    It holds the dictionaries of the modules, not copies of them: a module put elsewhere, a hook, a forward on an instance or another
    parameter are seen in them. Dtypes and devices are those of the tensors, at each call.
    """

    def __init__(self, container: nn.Module, found: _Linears) -> None:
        experts = [m for m in container._modules.values() if m is not None]
        parts = [(expert._modules, name, child) for expert in experts for name, child in expert._modules.items()]
        self.experts = experts
        self.parents, self.names, self.children = ([part[i] for part in parts] for i in range(3))
        watched = [*experts, *(child for child in self.children if child is not None)]
        self.instances = [m.__dict__ for m in watched]
        self.hooks = [m.__dict__[name] for m in watched for name in _HOOKS]
        self.parameters = [None if linears is None else [m._parameters for m in linears] for linears in found]
        self.biased = [linears is not None and linears[0]._parameters.get("bias") is not None for linears in found]

    def weights(self, container: nn.Module, like: Tensor | None) -> ExpertWeights | None:
        """The weights, or None if another look is needed."""
        if not (
            len(container._modules) == len(self.experts)
            and all(map(is_, container._modules.values(), self.experts))
            and all(map(is_, map(dict.get, self.parents, self.names), self.children))
            and not any(self.hooks)
            and not any(map(contains, self.instances, repeat("forward")))
        ):
            return None
        weights, biases = ([self._tensors(kind, wanted) for wanted in which] for kind, which in self._wanted())
        every = [t for tensors in (*weights, *biases) if tensors is not None for t in tensors]
        like = every[0] if like is None else like
        if like is None or not (
            all(map(is_not, every, repeat(None)))
            and set(map(type, every)) <= {nn.Parameter, Tensor}
            and set(map(_dtype_of, every)) == {like.dtype}
            and set(map(_device_of, every)) == {like.device}
        ):
            return None
        return _expert_weights(weights, biases)

    def _wanted(self) -> tuple[tuple[str, list[Any]], ...]:
        biased = [d if b else None for d, b in zip(self.parameters, self.biased, strict=True)]
        return ("weight", self.parameters), ("bias", biased)

    @staticmethod
    def _tensors(kind: str, dictionaries: list[dict[str, Any]] | None) -> list[Any] | None:
        return None if dictionaries is None else list(map(dict.get, dictionaries, repeat(kind)))

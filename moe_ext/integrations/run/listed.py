"""Reading the weights of experts that are modules of their own, in a ModuleList or ModuleDict: as they are, without stacking.

Everything may change between two calls (adapters, quantization, hooks, offloading), so everything is looked at in every call. For
plain linear layers that look is a comparison with the last one, done by the interpreter's own loops (`_Snapshot`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, contains, itemgetter
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ...experts import ListedWeights
from ..usable import NotNow, Refused, is_hooked, require_usable
from . import bitsandbytes, peft

#: gate, up and down projection of one expert, by the names that model code uses; other names are told apart by the proof.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = {nn.Parameter, Tensor}
_dtype_of, _device_of, _is_cpu = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")
_modules_of, _parameters_of, _weight_of, _bias_of = map(itemgetter, ("_modules", "_parameters", "weight", "bias"))


@dataclass
class ListedReader:
    """The projections gate (None when ungated), up and down of each expert in the child `container` ("" for the module itself)."""

    container: str
    projections: tuple[str | None, str, str]
    _proven: frozenset[tuple[type, ...]] | None = field(default=None, repr=False, compare=False)
    _snapshot: _Snapshot | None = field(default=None, repr=False, compare=False)
    #: Dense copies of 4-bit weights, where the user wants them kept between calls.
    cache: bitsandbytes.DenseCache | None = field(default=None, repr=False, compare=False)

    def read(self, module: nn.Module, like: Tensor | None = None) -> ListedWeights:
        """The tensors of the experts at this moment; raises Refused where they must be left to the module's own code."""
        container = container_of(module, self.container)
        compiling = torch.compiler.is_compiling()  # a compiler guards what it has seen by itself
        snapshot = self._snapshot
        if not compiling and _has_any_global_hook():
            raise Refused("hooks are registered for the calls of all modules")
        if not compiling and snapshot is not None:
            weights = snapshot.weights(container, like)
            if weights is not None:
                return weights
        found = collect_linears(container, self.projections)
        self._require_proven(_kinds(container, self.projections))
        if all(type(linear) is nn.Linear for linears in found if linears for linear in linears):
            if not compiling:
                self._snapshot = _Snapshot(container, found)
            return _plain(found, like)
        return _weights(found, lambda linears: _projection(linears, like, self.cache))

    def _require_proven(self, kinds: frozenset[tuple[type, ...]]) -> None:
        if self._proven is None:
            self._proven = kinds  # the first to read is the proof
        elif not kinds <= self._proven:
            other = " with a ".join(cls.__name__ for cls in next(iter(kinds - self._proven)))
            raise Refused(f"an expert is a {other}, which none was when it was proven")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_snapshot": None}  # a copy has modules of its own


def container_of(module: nn.Module, name: str) -> nn.Module:
    children: Any = module._modules
    return children[name] if name else module


def members(container: nn.Module) -> list[nn.Module]:
    """The experts with weights; a list may also hold an activation, a dropout, or experts that return their input."""
    return [m for m in container._modules.values() if m is not None and (m._modules or m._parameters)]


def identities(container: nn.Module) -> int:
    return sum(type(m) is nn.Identity for m in container._modules.values())


_Linears = tuple[list[nn.Module] | None, list[nn.Module], list[nn.Module]]


def collect_linears(container: nn.Module, projections: tuple[str | None, str, str]) -> _Linears:
    """The modules of each projection; raises Refused where something stands against calling them together."""
    experts = [expert for expert in require_no_hooks(container) if expert._modules]  # others return their input

    def linears(name: str) -> list[nn.Module]:
        return [_child(container, expert, name) for expert in experts]

    gate, up, down = projections
    return None if gate is None else linears(gate), linears(up), linears(down)


def require_no_hooks(container: nn.Module) -> list[nn.Module]:
    """The modules of the list; raises Refused where one of them, or a part of one, has hooks or a forward of its own."""
    found = []
    for name, expert in container._modules.items():
        if expert is None:
            continue
        if is_hooked(expert):
            raise NotNow(f"expert {name} has hooks or a forward of its own")
        for child in expert._modules.values():
            if child is not None and is_hooked(child):
                raise NotNow(f"a part of expert {name} ({type(child).__name__}) has hooks or a forward of its own")
        found.append(expert)
    return found


def _child(container: nn.Module, expert: nn.Module, name: str) -> nn.Module:
    child = expert._modules.get(name)
    if child is None:
        number = next(n for n, m in container._modules.items() if m is expert)
        raise Refused(f"expert {number} has no {name}")
    return child


def _kinds(container: nn.Module, projections: tuple[str | None, str, str]) -> frozenset[tuple[type, ...]]:
    """What decides on the formula of an expert: its class, and the classes of its children other than the projections."""
    return frozenset(
        (type(expert), *(type(child) for name, child in expert._modules.items() if name not in projections))
        for expert in container._modules.values()
    )


_T = TypeVar("_T")
#: The matrices of one projection of all experts, and their biases.
_Projected: TypeAlias = tuple[Any, Any]


def _weights(found: tuple[_T | None, _T, _T], project: Callable[[_T], _Projected]) -> ListedWeights:
    gate_proj, gate_bias = (None, None) if found[0] is None else project(found[0])
    up, down = project(found[1]), project(found[2])
    return ListedWeights(
        gate_proj=gate_proj, up_proj=up[0], down_proj=down[0], gate_bias=gate_bias, up_bias=up[1], down_bias=down[1]
    )  # fmt: skip


def _plain(found: _Linears, like: Tensor | None) -> ListedWeights:
    weights = _weights(found, _matrices)
    require_usable(weights.tensors(), like)
    return weights


def _matrices(linears: list[nn.Module]) -> _Projected:
    biases = [m._parameters.get("bias") for m in linears]
    present = sum(b is not None for b in biases)
    if present not in (0, len(biases)):
        raise Refused(f"{present} of {len(biases)} experts have a bias")
    return [m._parameters.get("weight") for m in linears], biases if present else None


def _projection(linears: list[nn.Module], like: Tensor | None, cache: bitsandbytes.DenseCache | None) -> _Projected:
    """Weights with adapters on them, in 4 bit, or both, each projection by itself."""
    base, adapters = peft.unwrap(linears) if peft.is_loaded() else (linears, [])
    weight: Any
    if any(bitsandbytes.is_quantized(m) for m in base):
        weight = bitsandbytes.read(base, like, cache)
    else:
        for m in base:
            if type(m) is not nn.Linear:
                raise Refused(f"a projection is a {type(m).__name__}, not a plain nn.Linear")
        weight = [m._parameters.get("weight") for m in base]
        require_usable(weight, like)
    return peft.project(weight, adapters), _matrices(base)[1]


class _Snapshot:
    """What the last look found, in a form in which "nothing has changed" is a few loops without bytecode.

    Modules, their classes and children, hooks, forwards on instances and parameters are compared with what they were; classes, dtypes
    and devices of the tensors are looked at in each call. A list is compared with another by identity, item by item.
    """

    def __init__(self, container: nn.Module, found: _Linears) -> None:
        self.experts = [m for m in container._modules.values() if m is not None]
        self.expert_types = list(map(type, self.experts))
        self.expert_states = [m.__dict__ for m in self.experts]
        self.children = [dict(m._modules) for m in self.experts]
        self.linears = [m for linears in found if linears is not None for m in linears]
        self.linear_states = [m.__dict__ for m in self.linears]
        self.states = [*self.expert_states, *(child.__dict__ for d in self.children for child in d.values() if child is not None)]
        self.parts = sum(linears is not None for linears in found)
        self._read_hooks()

    def _read_hooks(self) -> None:
        """The dictionaries of hooks. They may be replaced, which shows in them only when the next hook is registered."""
        self.registered = RemovableHandle.next_id
        self.hooks = [state[name] for state in self.states for name in _HOOKS]

    def weights(self, container: nn.Module, like: Tensor | None) -> ListedWeights | None:
        """The weights, or None if another look is needed."""
        if self.registered != RemovableHandle.next_id:
            self._read_hooks()
        if not (
            list(container._modules.values()) == self.experts
            and list(map(type, self.experts)) == self.expert_types
            and list(map(_modules_of, self.expert_states)) == self.children
            and list(map(type, self.linears)).count(nn.Linear) == len(self.linears)
            and not any(self.hooks)
            and not any(map(contains, self.states, repeat("forward")))
        ):
            return None
        parameters = list(map(_parameters_of, self.linear_states))
        try:
            weights, biases = list(map(_weight_of, parameters)), list(map(_bias_of, parameters))
        except KeyError:  # replicas and pruned layers hold them elsewhere
            return None
        biased = biases.count(None) < len(biases)
        every = [*weights, *(b for b in biases if b is not None)] if biased else weights
        if not _are_alike(every, weights[0] if like is None else like):
            return None
        vectors: list[Any] = [None] * self.parts
        if biased:
            vectors = _split(biases, self.parts)
            if any(0 < part.count(None) < len(part) for part in vectors):
                return None
            vectors = [None if part[0] is None else part for part in vectors]
        parts = list(zip(_split(weights, self.parts), vectors, strict=True))
        return _weights((parts[0] if self.parts == 3 else None, parts[-2], parts[-1]), lambda part: part)


def _are_alike(tensors: list[Any], like: Tensor) -> bool:
    """Whether all are plain tensors of the dtype and on the device of `like`."""
    return (
        set(map(type, tensors)) <= _PLAIN
        and set(map(_dtype_of, tensors)) == {like.dtype}
        and (all(map(_is_cpu, tensors)) if like.is_cpu else set(map(_device_of, tensors)) == {like.device})
        and tensors[0].numel() > 0  # emptied by ZeRO-3, which shards all or none
    )


def _split(items: list[Any], parts: int) -> list[list[Any]]:
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]

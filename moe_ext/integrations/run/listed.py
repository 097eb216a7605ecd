"""Reading the weights of experts that are modules of their own, in a ModuleList or ModuleDict: as they are, without stacking.

Everything may change between two calls (adapters, quantization, hooks, offloading), so everything is looked at in every call. For
plain linear layers that look is a comparison with the last one, done by the interpreter's own loops (`_Snapshot`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...experts import ListedWeights
from ..usable import NotNow, Refused, is_hooked, require_usable
from . import bitsandbytes, peft
from .look import ListLook
from .unchanged import Basis

#: gate, up and down projection of one expert, by the names that model code uses; other names are told apart by the proof.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

_PLAIN = {nn.Parameter, Tensor}
_dtype_of, _device_of, _is_cpu = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")
_parameters_of, _weight_of, _bias_of = map(itemgetter, ("_parameters", "weight", "bias"))


@dataclass
class ListedReader:
    """The projections gate (None when ungated), up and down of each expert in the child `container` ("" for the module itself)."""

    container: str
    projections: tuple[str | None, str, str]
    #: What the formula of the experts was read from, when it was proven.
    basis: Basis = field(default_factory=Basis, repr=False, compare=False)
    _snapshot: _Snapshot | None = field(default=None, repr=False, compare=False)
    #: Dense copies of 4-bit weights, where the user wants them kept between calls.
    cache: bitsandbytes.DenseCache | None = field(default=None, repr=False, compare=False)

    def read(self, module: nn.Module, like: Tensor | None = None) -> ListedWeights:
        """The tensors of the experts at this moment; raises Refused where they must be left to the module's own code."""
        container = container_of(module, self.container)
        compiling = torch.compiler.is_compiling()  # a compiler guards what it has seen by itself
        if not compiling and _has_any_global_hook():
            raise Refused("hooks are registered for the calls of all modules")
        snapshot = None if compiling else self._snapshot
        states = None if snapshot is None else snapshot.look.states([m for m in container._modules.values() if m is not None])
        if snapshot is not None and states is not None and snapshot.pick is not None:
            weights = snapshot.weights(snapshot.pick(states[1]), like)
            if weights is not None:
                return weights
        if states is None or len(states) < 2:
            self._snapshot = None
            found = collect_linears(container, self.projections)
            self._require_proven(container, found, compiling)
        else:  # nothing was put on the experts or taken from them since the last call
            found = _linears(container, self.projections)
        if all(type(linear) is nn.Linear for linears in found if linears for linear in linears):
            return _plain(found, like)
        return _weights(found, lambda linears: _projection(linears, like, self.cache))

    def _require_proven(self, container: nn.Module, found: _Linears, compiling: bool) -> None:
        experts = [m for m in container._modules.values() if m is not None]
        if compiling:
            self.basis.require_traced(experts)
        else:
            look = self.basis.require_list(experts, [n for n in self.projections if n is not None])
            self._snapshot = _Snapshot(look, experts, found)

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
    require_no_hooks(container)
    return _linears(container, projections)


def _linears(container: nn.Module, projections: tuple[str | None, str, str]) -> _Linears:
    experts = [expert for expert in container._modules.values() if expert is not None and expert._modules]  # others return their input

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
    """What the last look found at plain linear layers. Where they are is compared with what it was (`ListLook`). The classes, dtypes and
    devices of their tensors are looked at in each call. No module or tensor is kept alive.
    """

    def __init__(self, look: ListLook, experts: list[nn.Module], found: _Linears) -> None:
        self.look = look
        self.pick: Callable[[Any], Any] | None = None
        if not all(type(linear) is nn.Linear for linears in found if linears for linear in linears):
            return  # adapters or 4-bit weights, which are read one by one
        self.parts = sum(linears is not None for linears in found)
        places = {id(m): i for i, m in enumerate(m for expert in experts for m in expert._modules.values() if m is not None)}
        self.pick = itemgetter(*(places[id(m)] for linears in found if linears is not None for m in linears))

    def weights(self, states: Sequence[dict[str, Any]], like: Tensor | None) -> ListedWeights | None:
        """The weights, or None if they have to be looked at one by one."""
        parameters = list(map(_parameters_of, states))
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

"""What replaces a method of a module that transformers' registry does not reach, on that instance alone.

A `Replacement` says where and by what: a method that receives the routing (`MethodReplacement`), a loop inside one (`LoopReplacement`),
or a grouped linear layer (`LinearReplacement`). The weights are read at each call; where they cannot be used, the module's own method
runs, and the reason is logged once.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ... import functional, ops
from ...experts import ExpertSpec, ExpertWeights
from ..formulas import Formula
from ..usable import OUR_PATCHES, Refused, log_once, require_enabled, require_usable
from . import loop_rewrite
from .code_reading import Scope
from .listed import ListedReader
from .loop_rewrite import Loop
from .routing import Routing
from .stacks import SeparateReader, StackedReader
from .unchanged import Basis

Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertSpec], Tensor]
Reader: TypeAlias = StackedReader | SeparateReader | ListedReader


class Replacement(Protocol):
    """Where our code takes over: in which method, of the found module itself or of a child of it."""

    attribute: str
    child: str

    @property
    def path(self) -> str:
        """ "fused" or "composed", as in the report."""

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call with these arguments computes with; raises Refused where the module's own method has to run."""

    def run(self, module: nn.Module, weights: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the method."""


@dataclass
class MethodReplacement:
    """Routed experts: their weights, their formula, and how the arguments of the method hold the routing."""

    attribute: str
    parameters: tuple[str, ...]
    reader: Reader
    formula: Formula
    routing: Routing
    without_gradient: bool = field(default=False, kw_only=True)  # the method computes under no_grad
    child: str = field(default="", kw_only=True)
    basis: Basis | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def path(self) -> str:
        return self.formula.path

    def scope(self, module: nn.Module) -> Scope:
        """Which code of `module` is not run any more."""
        return Scope((self.attribute,), self._read_anew())

    def remember(self, module: nn.Module) -> None:
        """Keeps what its formula was read from, at the end of the proof."""
        self.basis = Basis(self.scope(module))
        self.basis.remember(module)

    def _read_anew(self) -> frozenset[str]:
        return self.formula.read_anew | ({self.reader.container} if isinstance(self.reader, ListedReader) else set())

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExpertWeights:
        if self.basis is not None:
            self.basis.require(module)
        like = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()), None)
        return self.reader.read(module, like)

    def run(
        self,
        module: nn.Module,
        weights: ExpertWeights,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        compute: Compute | None = None,
    ) -> Any:
        """compute: what is called with rows, routing, weights and spec; a proof has others than `grouped_experts`."""
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        return self.compute(module, weights, compute or functional.grouped_experts, values)

    def compute(self, module: nn.Module, weights: ExpertWeights, compute: Compute, values: Mapping[str, Any]) -> Tensor:
        """What takes the place of the experts' results, from the values that hold the routing."""
        x, index, w = self.routing.resolve(values, weights.num_experts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.without_gradient):
            out = compute(x, index, w, weights, self.formula.resolve(module))
        if self.routing.beyond == "returned":
            returned = w.masked_fill(index < weights.num_experts, 0).sum(dim=-1, keepdim=True)
            out = out + x * returned.to(x.dtype)
        return self.result(loop_rewrite.as_hidden_states(out, values, self.routing), index, values)

    def result(self, out: Tensor, index: Tensor, values: Mapping[str, Any]) -> Tensor:
        """`out` is the sum over the experts of each row, in the shape of the hidden states."""
        return out


@dataclass
class LoopReplacement(MethodReplacement):
    """Routed experts in a loop: the method runs as a copy of its code without the loop, whose variables hold the routing."""

    reader: ListedReader
    loop: Loop
    _method: tuple[Any, Callable[..., Any]] | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_method": None}  # it is made of code, which cannot be pickled

    def scope(self, module: nn.Module) -> Scope:
        only = loop_rewrite.attributes_read(type(module), self.attribute, self.reader.container, self.loop, self.routing)
        return Scope((self.attribute,), self._read_anew(), only)

    def run(
        self,
        module: nn.Module,
        weights: ExpertWeights,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        compute: Compute | None = None,
    ) -> Any:
        cls: Any = type(module)
        code = getattr(cls, self.attribute).__code__
        if self._method is None or self._method[0] is not code:  # kept here, where a compiler sees it without making it anew
            self._method = code, loop_rewrite.without(cls, self.attribute, self.reader.container, self.loop, self.routing)
        experts = partial(self.compute, module, weights, compute or functional.grouped_experts)
        return self._method[1](module, *args, **kwargs, experts=experts)

    def result(self, out: Tensor, index: Tensor, values: Mapping[str, Any]) -> Tensor:
        return loop_rewrite.as_result(out, index, values, self.loop)


@dataclass
class LinearReplacement:
    """A layer of E linear maps, a child of the found module ("" for itself): `forward(x [S, in], counts)`, where counts says how many
    consecutive rows each map gets.
    """

    child: str
    weight: str
    transposed: bool
    attribute: str = "forward"
    path: str = "composed"

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args) != 2 or kwargs:
            raise Refused("it is called with other arguments than rows and their counts")
        weight = module._parameters.get(self.weight)
        if weight is None:
            raise Refused(f"{self.weight} is missing or is computed by a parametrization")
        require_usable([weight], args[0])
        return weight

    def run(self, module: nn.Module, weights: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, counts = args
        return ops.grouped_mm(x, weights, offsets(counts, x), transposed=self.transposed)


def offsets(counts: Any, like: Tensor) -> Tensor:
    """`expert_offsets [E+1]` of the counts of consecutive rows, a list or a tensor `[E]`."""
    n = counts.to(like.device) if isinstance(counts, Tensor) else torch.tensor(counts, device=like.device)
    return torch.cat((n.new_zeros(1), n.cumsum(0))).to(torch.int32)


class _OnInstance:
    """A callable that is an attribute of a module. It does not keep the module alive, and belongs to the copy when that is copied."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def moe_ext_module(self) -> nn.Module:
        """The module it belongs to; raises ReferenceError where that is gone."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module that moe_ext enabled is gone; call moe_ext.enable on the copy that is left")
        return module

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_module": self.moe_ext_module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_module": weakref.ref(state["_module"])})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        module = self.moe_ext_module
        # Without its module it is copied as a function is: it goes on belonging to the one that is there.
        state = {name: value for name, value in self.__dict__.items() if name != "_module"}
        twin.__setstate__(copy.deepcopy(state, memo) | {"_module": memo.get(id(module), module)})
        return twin


class Patch(_OnInstance):
    """The callable put on the instance. The weights are not kept in it."""

    def __init__(self, module: nn.Module, replacement: Replacement) -> None:
        super().__init__(module)
        self.replacement = replacement
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, replacement = self.moe_ext_module, self.replacement
        if self.active:
            try:
                require_enabled()
                weights = replacement.read(module, args, kwargs)
            except Refused as refused:
                log_once(f"{type(module).__name__} runs its own {replacement.attribute}: {refused}")
            else:
                return replacement.run(module, weights, args, kwargs)
        return getattr(type(module), replacement.attribute)(module, *args, **kwargs)


def parameters_of(cls: type, attribute: str) -> tuple[str, ...]:
    """Names of the arguments of a method behind self."""
    return tuple(inspect.signature(getattr(cls, attribute)).parameters)[1:]


# ---------------------------------------------------------------------------------------------------------------- on the instance
def patches_of(module: nn.Module) -> dict[str, Patch]:
    """Ours by method, also when something else has been wrapped around them since."""
    return module.__dict__.get(OUR_PATCHES, {})


def is_enabled(module: nn.Module) -> bool:
    return any(patch.active for patch in patches_of(module).values())


def apply(module: nn.Module, replacement: Replacement) -> None:
    """Takes over; where a patch of ours is there already, below other wrappers or not, that one is switched on again."""
    module = module.get_submodule(replacement.child)
    if isinstance(replacement, MethodReplacement):
        replacement.remember(module)
    attribute, patch = replacement.attribute, Patch(module, replacement)
    ours = patches_of(module).get(attribute)
    if ours is not None:
        ours.__dict__.update(patch.__dict__)
        return
    module.__dict__.setdefault(OUR_PATCHES, {})[attribute] = patch
    module.__dict__[attribute] = patch
    module.__dict__[_REPLICATE] = _Replicate(module)


def revert(module: nn.Module) -> bool:
    """Takes back `apply`, and nothing else; whether the module was enabled. A wrapper that was put around our method since then stays,
    and finds it inert.
    """
    was_active = is_enabled(module)
    for name, part in [("", module), *module.named_children()]:
        was_active |= any(patch.active and patch.replacement.child == name for patch in patches_of(part).values())
        for attribute, patch in list(patches_of(part).items()):
            if patch.replacement.child == name or part is module:
                _revert(part, attribute, patch)
    return was_active


def _revert(module: nn.Module, attribute: str, patch: Patch) -> None:
    patch.active = False
    ours = module.__dict__[OUR_PATCHES]
    if module.__dict__.get(attribute) is patch:
        del module.__dict__[attribute], ours[attribute]
    if not ours:
        del module.__dict__[OUR_PATCHES], module.__dict__[_REPLICATE]


#: The method by which `nn.DataParallel` copies a module for another device.
_REPLICATE = "_replicate_for_data_parallel"


class _Replicate(_OnInstance):
    """A replica has the attributes of the original: without this its forward would be ours on the original, with its weights."""

    def __call__(self) -> nn.Module:
        module = self.moe_ext_module
        replica = getattr(type(module), _REPLICATE)(module)
        del replica.__dict__[_REPLICATE]
        ours = replica.__dict__[OUR_PATCHES] = {}
        for attribute, patch in patches_of(module).items():
            if replica.__dict__.get(attribute) is patch:
                ours[attribute] = replica.__dict__[attribute] = Patch(replica, patch.replacement)
        return replica

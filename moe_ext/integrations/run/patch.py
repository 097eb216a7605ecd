"""What replaces a method of a module that transformers' registry does not reach, on that instance alone.

A `Cut` says where: a method that receives the routing, or a loop inside one (`Experts`), or a grouped linear layer (`Linear`). The
weights are read at each call; where they cannot be used, the module's own method runs, and the reason is logged once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import functional, ops
from ...experts import ExpertSpec, ExpertWeights
from ..formulas import Formula
from ..sandbox import OUR_PATCHES
from ..usable import DISABLE_VARIABLE, disabled_by_environment, log_once
from . import loop_rewrite
from .listed import Listed
from .loop_rewrite import Loop
from .routing import Routing
from .stacks import Reader, unusable

Compute = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertSpec], Tensor]


class Cut(Protocol):
    """Where our code takes over: in which method, of the found module itself or of a child of it."""

    attribute: str
    child: str

    @property
    def path(self) -> str: ...

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the method, or the reason why the module's own has to run."""


@dataclass
class Experts:
    """Routed experts: their weights, their formula, and how the method holds the routing, in its arguments or before its loop."""

    attribute: str
    reader: Reader | Listed
    formula: Formula
    routing: Routing
    parameters: tuple[str, ...] = ()
    loop: Loop | None = None
    child: str = ""
    without_gradient: bool = False  # the method computes under no_grad
    _method: tuple[type, Callable[..., Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> str:
        return self.formula.path

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_method": None}  # it is made of code, which cannot be pickled

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute | None = None) -> Any:
        values = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        like = next((t for t in values.values() if isinstance(t, Tensor) and t.is_floating_point()), None)
        weights = self.reader.read(module, like)
        if isinstance(weights, str):
            return Refusal(weights)
        experts = partial(self.compute, module, weights, compute or functional.grouped_experts)
        if self.loop is None:
            return experts(values)
        if self._method is None or self._method[0] is not type(module):  # kept here, where a compiler sees it without making it anew
            assert isinstance(self.reader, Listed)
            self._method = type(module), loop_rewrite.without(type(module), self.attribute, self.reader.container, self.loop, self.routing)
        return self._method[1](module, *args, **kwargs, experts=experts)

    def compute(self, module: nn.Module, weights: ExpertWeights, compute: Compute, values: Mapping[str, Any]) -> Tensor:
        x, index, w = self.routing.resolve(values, weights.num_experts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.without_gradient):
            out = compute(x, index, w, weights, self.formula.resolve(module))
        if self.routing.beyond == "returned":
            returned = w.masked_fill(index < weights.num_experts, 0).sum(dim=-1, keepdim=True)
            out = out + x * returned.to(x.dtype)
        return loop_rewrite.like_result(out, index, values, self.routing, self.loop)


@dataclass
class Linear:
    """A layer of E linear maps, a child of the found module ("" for itself): `forward(x [S, in], counts)`, where counts says how many
    consecutive rows each map gets.
    """

    child: str
    weight: str
    transposed: bool
    attribute: str = "forward"
    path: str = "composed"

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 2 or kwargs:
            return Refusal("it is called with other arguments than rows and their counts")
        x, counts = args
        weight = module._parameters.get(self.weight)
        if weight is None:
            return Refusal(f"{self.weight} is missing or is computed by a parametrization")
        reason = unusable([weight], x)
        if reason is not None:
            return Refusal(reason)
        return ops.grouped_mm(x, weight, offsets(counts, x), transposed=self.transposed)


def offsets(counts: Any, like: Tensor) -> Tensor:
    """`expert_offsets [E+1]` of the counts of consecutive rows, a list or a tensor `[E]`."""
    n = counts.to(like.device) if isinstance(counts, Tensor) else torch.tensor(counts, device=like.device)
    return torch.cat((n.new_zeros(1), n.cumsum(0))).to(torch.int32)


@dataclass(frozen=True)
class Refusal:
    """Why a call was left to the module's own method."""

    reason: str


class Patch:
    """The callable put on the instance. It holds the module, not its weights, and is copied and pickled with it."""

    def __init__(self, module: nn.Module, cut: Cut) -> None:
        self.moe_ext_module = module
        self.cut = cut
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, cut = self.moe_ext_module, self.cut
        if self.active:
            out = Refusal(f"{DISABLE_VARIABLE} is set") if disabled_by_environment() else cut.run(module, args, kwargs)
            if not isinstance(out, Refusal):
                return out
            log_once(f"{type(module).__name__} runs its own {cut.attribute}: {out.reason}")
        return getattr(type(module), cut.attribute)(module, *args, **kwargs)


def parameters_of(cls: type, attribute: str) -> tuple[str, ...]:
    """Names of the arguments of a method behind self."""
    return tuple(inspect.signature(getattr(cls, attribute)).parameters)[1:]


# ---------------------------------------------------------------------------------------------------------------- on the instance
def patches_of(module: nn.Module) -> dict[str, Patch]:
    """Ours by method, also when something else has been wrapped around them since."""
    return module.__dict__.get(OUR_PATCHES, {})


def is_enabled(module: nn.Module) -> bool:
    return any(patch.active for patch in patches_of(module).values())


def apply(module: nn.Module, cut: Cut) -> None:
    """Cuts in; where a patch of ours is there already, below other wrappers or not, that one is switched on again."""
    module = module.get_submodule(cut.child)
    attribute, patch = cut.attribute, Patch(module, cut)
    ours = patches_of(module).get(attribute)
    if ours is not None:
        ours.__dict__.update(patch.__dict__)
        return
    module.__dict__.setdefault(OUR_PATCHES, {})[attribute] = patch
    module.__dict__[attribute] = patch
    module.__dict__[_REPLICATE] = partial(_replicate, module)


def revert(module: nn.Module) -> bool:
    """Takes back `apply`, and nothing else; whether the module was enabled. A wrapper that was put around our method since then stays,
    and finds it inert.
    """
    was_active = is_enabled(module)
    for name, part in [("", module), *module.named_children()]:
        was_active |= any(patch.active and patch.cut.child == name for patch in patches_of(part).values())
        for attribute, patch in list(patches_of(part).items()):
            if patch.cut.child == name or part is module:
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


def _replicate(module: nn.Module) -> nn.Module:
    """A replica has the attributes of the original: without this its forward would be ours on the original, with its weights."""
    replica = getattr(type(module), _REPLICATE)(module)
    del replica.__dict__[_REPLICATE]
    ours = replica.__dict__[OUR_PATCHES] = {}
    for attribute, patch in patches_of(module).items():
        if replica.__dict__.get(attribute) is patch:
            ours[attribute] = replica.__dict__[attribute] = Patch(replica, patch.cut)
    return replica

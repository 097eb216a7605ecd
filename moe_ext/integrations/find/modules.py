"""Which modules of a model look like experts, by their structure alone: nothing is run, no class name is asked.

Behind transformers' decorator (its flags say the layout), stacked or flattened parameters, lists of alike MLPs, grouped linear layers.
What those without a decorator compute, and where their routing is, is found out by `candidates` and proven. Everything that looks like
experts and is not supported is listed with the reason.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import transformers_facts
from ..formulas import Formula, own_formula, plain_candidates
from ..run import decorated, listed
from ..run.patch import Reader
from ..run.stacks import stacks
from ..usable import NotNow, Refused, require_known_dtypes, require_own_method, require_plain, require_usable
from . import layouts
from .alike import are_experts, linears, require_alike, require_known_activation


@dataclass
class Found:
    """One set of experts. layout: what the report says of its weights."""

    module: nn.Module
    layout: str
    name: str = field(default="", kw_only=True)
    adapted: bool = field(default=False, kw_only=True)  # an adapter is around it


@dataclass
class DecoratedExperts(Found):
    """Experts behind transformers' decorator. formula: what they compute, or why we cannot compute it in their place."""

    formula: Formula | Refused


@dataclass
class RoutedExperts(Found, ABC):
    """Experts whose routing is found by running `owner`: the module itself where it routes, else the module around it."""

    owner: nn.Module

    @property
    def container(self) -> str:
        """The name of the child that is the list of experts; "" where the module itself holds them."""
        return ""

    def experts(self) -> nn.Module:
        """The module that holds the experts and nothing else."""
        return listed.container_of(self.module, self.container)

    @abstractmethod
    def sizes(self) -> list[int]:
        """Every number that may be H, the likely ones first."""

    @abstractmethod
    def count(self) -> int:
        """E, or 0 where only the weights can tell."""

    @abstractmethod
    def may_return_inputs(self) -> bool:
        """Whether there may be experts that return their input."""

    @abstractmethod
    def candidates(self, hidden: int) -> Iterator[tuple[Reader, list[Formula]]]:
        """Every layout that the shapes allow for this H, with the formulas it may go with."""


@dataclass
class StackedExperts(RoutedExperts):
    """Experts in parameters of the module, stacked `[E, ...]` or flattened."""

    def sizes(self) -> list[int]:
        shapes = [t.shape for t in stacks(self.module).values()]
        depth = max(len(s) for s in shapes)
        return list(dict.fromkeys(n for s in shapes if len(s) == depth for n in (s[1:] if depth == 3 else tuple(reversed(s)))))

    def count(self) -> int:
        return 0

    def may_return_inputs(self) -> bool:
        rows = {t.shape[0] for t in stacks(self.module).values() if t.dim() == 3}
        return len(rows) > 1 or any(type(child) is nn.Identity for child in self.module.children())

    def candidates(self, hidden: int) -> Iterator[tuple[Reader, list[Formula]]]:
        for reader, spec in layouts.layouts(self.module, hidden):
            formulas = plain_candidates(self.module, spec.gated)
            yield reader, [Formula(layouts.with_formula(spec, f.spec), f.own_gate) for f in formulas]


@dataclass
class ListedExperts(RoutedExperts):
    """Experts that are modules of their own, in the list `child` of the module, or in the module itself."""

    child: str

    @property
    def container(self) -> str:
        return self.child

    def sizes(self) -> list[int]:
        layers = linears(listed.members(self.experts())[0])
        return list(dict.fromkeys(int(n) for m in layers.values() for n in (m.in_features, m.out_features)))

    def count(self) -> int:
        return len(listed.members(self.experts()))

    def may_return_inputs(self) -> bool:
        return listed.identities(self.experts()) > 0

    def candidates(self, hidden: int) -> Iterator[tuple[Reader, list[Formula]]]:
        expert = listed.members(self.experts())[0]
        for projections in layouts.projections(linears(expert), hidden):
            yield listed.ListedReader(self.child, projections), list(plain_candidates(expert, projections[0] is not None))


@dataclass
class LinearExperts(Found):
    """A block whose experts are grouped linear layers, called with rows and their counts."""


@dataclass
class Unsupported(Found):
    """What looks like experts, and why we cannot compute it."""

    refused: Refused


def find_experts(model: nn.Module) -> list[Found]:
    """Every set of experts in `model`, each module once, in the order of `named_modules`."""
    found: list[Found] = []
    inside: set[nn.Module] = set()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module in inside:
            continue
        path, parent = name, None
        while path and (parent is None or transformers_facts.is_wrapper(parent)):
            path = path.rpartition(".")[0]
            parent = modules[path]
        one = _examine(name, module, parent)
        if one is not None:
            one.name, one.adapted = name.replace(f".{transformers_facts.WRAPPED}", ""), name.endswith(f".{transformers_facts.WRAPPED}")
            found.append(one)
            inside.update(module.modules())
    return found


def _examine(name: str, module: nn.Module, parent: nn.Module | None) -> Found | None:
    if transformers_facts.is_decorated(module):
        return _decorated(module)
    if transformers_facts.is_wrapper(module):  # its parameters are those of an adapter, and what it wraps comes next
        return None
    for child_name, child in module._modules.items():
        if type(child) in (nn.ModuleList, nn.ModuleDict) and are_experts(child) and _routes(module, child):
            return _listed(module, child_name, module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        if type(module).__module__.startswith("torch.nn.") or not are_experts(module) or parent is None or not _routes(parent, module):
            return _other(name, module)
        return _listed(module, "", parent)
    if type(module).__module__.startswith("torch.nn."):
        return None
    return _stacks(module, parent) or _other(name, module)


# --------------------------------------------------------------------------------------------------------------------- by kind
def _decorated(module: nn.Module) -> DecoratedExperts:
    try:
        formula: Formula | Refused = decorated.formula_of(module)
    except Refused as refused:
        formula = refused.with_traceback(None)
    spec = (own_formula(module) if isinstance(formula, Refused) else formula).spec
    return DecoratedExperts(module, decorated.layout_of(module, spec), formula)


def _listed(module: nn.Module, container: str, owner: nn.Module) -> Found:
    experts = listed.container_of(module, container)
    try:
        require_plain(experts)
        require_known_dtypes(experts)
        require_own_method(module)
        require_alike(experts, container or "expert")
        listed.require_no_hooks(experts)
        require_known_activation(experts)
    except Refused as refused:
        return Unsupported(module, "module list", refused.with_traceback(None))
    return ListedExperts(module, "module list", owner, container)


def _stacks(module: nn.Module, parent: nn.Module | None) -> Found | None:
    own_stacks = stacks(module)
    cubes = {n: t for n, t in own_stacks.items() if t.dim() == 3}
    arguments = len(inspect.signature(type(module).forward).parameters) - 1
    linear = grouped_linears(module)
    if linear and (arguments == 1 or "" in linear):
        return _linear(module, linear, cubes)
    own = [p for p in module._parameters.values() if p is not None]
    if parent is None or not layouts.has_stacks(module) or not (arguments > 1 or any(p.dim() == 3 for p in own)):
        return None
    if any(len([p for p in child.parameters(recurse=False) if p.dim() == 3]) > 1 for child in module.children()):
        return None  # these are the experts of a child
    inside = {id(t) for t in own_stacks.values()}
    count = next((t.shape[0] for t in cubes.values()), None)
    alone = count is not None and any(id(p) not in inside and _has_side(p, count) for p in _near_parameters(module, 1))
    if not alone and not _routes(parent, module, count):
        return None
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in (cubes or own_stacks).items() if t.dim() == (3 if cubes else 2))
    layout = f"stacked, {shapes}" if cubes else f"flattened, {shapes}"
    try:
        require_plain(module)
        require_usable(list(own_stacks.values()))
        require_own_method(module)
    except Refused as refused:
        return Unsupported(module, layout, refused.with_traceback(None))
    return StackedExperts(module, layout, module if alone else parent)


def _linear(module: nn.Module, linear: dict[str, nn.Module], cubes: dict[str, Tensor]) -> Found:
    layout = "grouped linear, " + ", ".join(f"{n} {list(t.shape)}" for n, t in cubes.items())
    try:
        require_plain(module)
        require_usable(list(cubes.values()))
        for child in linear.values():
            require_own_method(child)
    except Refused as refused:
        return Unsupported(module, layout, refused.with_traceback(None))
    return LinearExperts(module, layout)


def grouped_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Children with one matrix per expert that are called with rows and their counts; the module itself, as "", if it is one."""

    def is_one(m: nn.Module) -> bool:
        own = [p for p in m._parameters.values() if p is not None]
        called = inspect.signature(type(m).forward).parameters
        return len(own) == 1 and own[0].dim() == 3 and own[0].shape[0] > 1 and not m._modules and len(called) == 3

    if is_one(module):
        return {"": module}
    found = {name: child for name, child in module._modules.items() if child is not None and is_one(child)}
    return found if len(found) > 1 else {}


def _routes(owner: nn.Module, experts: nn.Module, count: int | None = None) -> bool:
    """Whether `owner` may route to the experts: its code chooses, and it holds, beside them, a matrix with a side for their scores."""
    if count is None and isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        count = len(listed.members(experts))
    inside = {id(p) for p in experts.parameters()}
    return _chooses(owner, experts) and any(
        id(p) not in inside and (_has_side(p, count) if count is not None else p.dim() == 2) for p in _near_parameters(owner, 2)
    )


def _has_side(p: Tensor, experts: int) -> bool:
    """A matrix with a side of E, or of somewhat more: scores of experts that compute nothing; or one in a packed form."""
    if p.dim() != 2:
        return False
    return any(experts <= side <= 2 * experts for side in p.shape) or not p.is_floating_point()


#: Names in the code of anything that picks experts: functions of torch, and what a router is called where that is in another module.
_CHOICES = {"topk", "argmax", "max", "sort", "argsort", "multinomial", "one_hot", "nonzero", "kthvalue", "router", "gate", "gating"}


def _chooses(owner: nn.Module, experts: nn.Module) -> bool:
    inside = set(experts.modules())
    classes = {c for m in (owner, *owner.children()) if m not in inside for c in type(m).__mro__ if not c.__module__.startswith("torch.")}
    functions = [inspect.unwrap(f) for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    return any(not _CHOICES.isdisjoint(f.__code__.co_names) for f in functions)


def _near_parameters(module: nn.Module, depth: int) -> Iterator[nn.Parameter]:
    yield from (p for p in module._parameters.values() if p is not None)
    if depth:
        for child in module._modules.values():
            if child is not None:
                yield from _near_parameters(child, depth - 1)


# -------------------------------------------------------------------------------------------------------------------------- other
def _other(name: str, module: nn.Module) -> Found | None:
    """Weights that look like experts, with the reason why they are not supported."""
    last = name.rpartition(".")[2].lower()
    if type(module).__module__.startswith("moe_ext."):
        return Unsupported(module, "moe_ext", Refused(f"it is a moe_ext.{type(module).__name__} already"))
    if ("expert" not in last and "expert" not in type(module).__name__.lower()) or "shared" in last:
        return None
    stacks = [f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None and p.dim() == 3]
    if any(p is not None and p.dim() > 1 and p.numel() == 0 for p in module._parameters.values()):
        return Unsupported(module, "stacked", NotNow("a weight is empty: it is sharded by ZeRO-3, or not loaded"))
    if stacks:
        return Unsupported(module, "stacked", Refused(f"{', '.join(stacks)} are no two or three matrices per expert beside a router"))
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) > 1:
        one = next(iter(module._modules.values()))
        reason = f"its experts ({type(one).__name__}) are not alike MLPs of two or three linear layers beside a router"
        return Unsupported(module, type(module).__name__, Refused(reason))
    if any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return Unsupported(module, "unknown", Refused("its weights are neither stacked in three dimensions nor a list of MLPs"))
    return None

"""Which modules of a model look like experts, by their structure alone: nothing is run, no class name is asked.

Behind transformers' decorator (its flags say the layout), stacked or flattened parameters, lists of alike MLPs, grouped linear layers.
What those without a decorator compute, and where their routing is, is found out by `search` and proven. Everything that looks like
experts and is not supported is listed with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...experts import ExpertSpec
from .. import transformers_facts
from ..formulas import Formula, activation_name, own_formula, stacked_formula
from ..run import listed, stacks
from ..sandbox import replaced_method, undisturbed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Found:
    """One set of experts, or a reason why it is none for us.

    kind: "decorated" (with its formula), "stacked" and "listed" (to be searched), "linear" (a grouped linear layer), "other".
    owner: what is run to see the routing: the module itself where it routes, else the module around it.
    container: of listed experts, the name of the list in the module, or "" if the module is the list.
    """

    module: nn.Module
    kind: str
    layout: str
    formula: Formula | None = None
    reason: str | None = None
    owner: nn.Module | None = None
    container: str = ""
    name: str = ""
    adapted: bool = False  # an adapter is around it


def find(model: nn.Module) -> list[Found]:
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
        return stacked(module)
    if transformers_facts.is_wrapper(module):  # its parameters are those of an adapter, and what it wraps comes next
        return None
    for child_name, child in module._modules.items():
        if type(child) in (nn.ModuleList, nn.ModuleDict) and _are_experts(child) and _routes(module, child):
            return _listed(module, child_name, module)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        if type(module).__module__.startswith("torch.nn.") or not _are_experts(module) or parent is None or not _routes(parent, module):
            return _other(name, module)
        return _listed(module, "", parent)
    if type(module).__module__.startswith("torch.nn."):
        return None
    return _stacks(module, parent) or _other(name, module)


# --------------------------------------------------------------------------------------------------------------------- decorated
def stacked(module: nn.Module) -> Found:
    """Experts behind transformers' decorator. The flags say the layout; shapes are never asked (square weights are ambiguous)."""
    reason = _decorated_reason(module)
    formula = stacked_formula(module) if reason is None else None
    layout = _decorated_layout(module, (formula or own_formula(module)).spec)
    return Found(module, "decorated", layout, formula, reason)


def _decorated_layout(module: nn.Module, spec: ExpertSpec) -> str:
    rows = "2I" if spec.gated else "I"
    words = [f"stacked [E,H,{rows}]" if spec.transposed else f"stacked [E,{rows},H]"]
    words += ["interleaved"] if spec.interleaved else []
    words += ["bias"] if transformers_facts.flag(module, "has_bias") else []
    return ", ".join(words)


def _decorated_reason(module: nn.Module) -> str | None:
    if transformers_facts.registry_of(module) is not transformers_facts.experts_registry():
        return f"its class runs through a registry of its own, {type(transformers_facts.registry_of(module)).__name__}"
    if transformers_facts.experts_implementation(module) in transformers_facts.LOCKED_IMPLEMENTATIONS:
        return f"experts_implementation={transformers_facts.experts_implementation(module)!r} has rewritten the weights at load time"
    first = "gate_up_proj" if transformers_facts.flag(module, "has_gate") else "up_proj"
    names = {first: 3, "down_proj": 3}
    if transformers_facts.flag(module, "has_bias"):
        names |= {f"{first}_bias": 2, "down_proj_bias": 2}
    dtypes = set()
    for name, dim in names.items():
        t = getattr(module, name, None)
        if not isinstance(t, Tensor):
            return f"{name} is missing"
        if t.dim() != dim:
            return f"{name} has shape {tuple(t.shape)}, expected {dim} dimensions"
        dtypes.add(t.dtype)
    # Below a hook of accelerate its forward still asks the registry, when the weights are where they are needed.
    replaced = None if transformers_facts.has_accelerate_hook(module) else replaced_method(module)
    return _wrapped_reason(module) or _dtype_reason(dtypes) or replaced


def _wrapped_reason(module: nn.Module) -> str | None:
    other = next((p for p in module.parameters() if is_traceable_wrapper_subclass(p)), None)
    return None if other is None else f"a weight is a {type(other).__name__}, not a plain tensor: enable before the model is sharded"


def _dtype_reason(dtypes: set[torch.dtype]) -> str | None:
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    if len(dtypes) > 1:
        return f"its weights have different dtypes: {names}"
    if not dtypes <= set(DTYPES):
        return f"its weights are {names}; supported are float64, float32, bfloat16, float16"
    return None


# ------------------------------------------------------------------------------------------------------------------ own parameters
def _stacks(module: nn.Module, parent: nn.Module | None) -> Found | None:
    own_stacks = stacks.stacks(module)
    cubes = [t for t in own_stacks.values() if t.dim() == 3]
    own = [p for p in module._parameters.values() if p is not None]
    arguments = len(inspect.signature(type(module).forward).parameters) - 1
    linear = grouped_linears(module)
    if linear and (arguments == 1 or "" in linear):
        reasons = (replaced_method(child) for child in linear.values())
        reason = _wrapped_reason(module) or _dtype_reason({t.dtype for t in cubes}) or next((r for r in reasons if r is not None), None)
        return Found(
            module,
            "linear",
            "grouped linear, " + ", ".join(f"{n} {list(t.shape)}" for n, t in own_stacks.items() if t.dim() == 3),
            reason=reason,
        )
    if parent is None or not stacks.has_stacks(module) or not (arguments > 1 or any(p.dim() == 3 for p in own)):
        return None
    if any(len([p for p in child.parameters(recurse=False) if p.dim() == 3]) > 1 for child in module.children()):
        return None  # these are the experts of a child
    inside = {id(t) for t in own_stacks.values()}
    alone = bool(cubes) and any(id(p) not in inside and _has_side(p, cubes[0].shape[0]) for p in _near_parameters(module, 1))
    owner = module if alone else parent
    if not alone and not _routes(parent, module, cubes[0].shape[0] if cubes else None):
        return None
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in own_stacks.items() if t.dim() == (3 if cubes else 2))
    layout = f"stacked, {shapes}" if cubes else f"flattened, {shapes}"
    reason = _wrapped_reason(module) or _dtype_reason({t.dtype for t in own_stacks.values()}) or replaced_method(module)
    return Found(module, "stacked", layout, reason=reason, owner=owner)


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


# -------------------------------------------------------------------------------------------------------------------- module lists
def _are_experts(container: Any) -> bool:
    """Several modules of one class, each of two or three linear layers and things without parameters."""
    experts = listed.members(container)
    return len(experts) > 1 and len({type(e) for e in experts}) == 1 and linears(experts[0]) is not None


def linears(expert: nn.Module) -> dict[str, nn.Module] | None:
    """The linear layers of one expert, or None where it is something else."""
    if type(expert).__module__.startswith("torch.nn.") or expert._parameters:
        return None
    found = {n: m for n, m in expert._modules.items() if m is not None and hasattr(m, "in_features") and hasattr(m, "out_features")}
    others = [m for n, m in expert._modules.items() if m is not None and n not in found]
    return found if len(found) in (2, 3) and not any(True for m in others for _ in m.parameters()) else None


def _listed(module: nn.Module, container: str, owner: nn.Module) -> Found:
    found = Found(module, "listed", "module list", owner=owner, container=container)
    experts = listed.container_of(module, container)
    found.reason = (
        _wrapped_reason(experts) or replaced_method(module) or _experts_reason(experts, container or "expert") or _hook_reason(experts)
    )
    if found.reason is None:
        with undisturbed(experts):
            found.reason = _activation_reason(experts)
    return found


def _experts_reason(container: nn.Module, label: str) -> str | None:
    experts = listed.members(container)
    first: list[Any] | None = None
    for i, expert in enumerate(experts):
        found = linears(expert) or {}
        shapes = [(n, m.in_features, m.out_features, m.bias is not None) for n, m in found.items()]
        first = first or shapes
        for name, *_ in first:
            if name not in found and not hasattr(child := getattr(expert, name, None), "in_features"):
                return f"{label}.{i}.{name} is a {type(child).__name__}, not a linear layer"
        if shapes != first:
            return f"{label}.{i} differs in shapes or biases from {label}.0"
        if i and (difference := _differs(experts[0], expert)) is not None:
            return f"{label}.{i} has another {difference} than {label}.0"
        reason = replaced_method(expert)
        if reason:
            return f"{label}.{i}: {reason}"
        for name, child in expert._modules.items():
            if isinstance(child, nn.Dropout) and child.p > 0:
                return f"{label}.{i}.{name} drops out with p={child.p}, between its projections"
    return None


def _hook_reason(container: nn.Module) -> str | None:
    seen = listed.look(container, ())
    return seen if isinstance(seen, str) else None


def _differs(first: nn.Module, other: nn.Module) -> str | None:
    """The part or the number in which two experts of one class differ; whole numbers may count them."""
    layers = linears(first) or {}
    parts = [("", first, other), *((n, first._modules[n], other._modules.get(n)) for n in first._modules if n not in layers)]
    for name, a, b in parts:
        if a is None or b is None or type(a) is not type(b):
            return name
        for key, value in vars(a).items():
            if isinstance(value, (bool, float, str)) and key != "training" and vars(b).get(key) != value:
                return f"{name}.{key}".removeprefix(".")
    return None


def _activation_reason(container: nn.Module) -> str | None:
    names: dict[int, str | None] = {}
    for expert in listed.members(container):
        act_fn = getattr(expert, "act_fn", None)
        if act_fn is not None and id(act_fn) not in names:
            names[id(act_fn)] = activation_name(act_fn)
            if names[id(act_fn)] is None:
                return f"act_fn {getattr(act_fn, '__name__', type(act_fn).__name__)} of its experts is not known"
    if len(set(names.values())) > 1:
        return f"its experts have different activations: {', '.join(sorted(map(str, set(names.values()))))}"
    return None


# -------------------------------------------------------------------------------------------------------------------------- other
def _other(name: str, module: nn.Module) -> Found | None:
    """Weights that look like experts, with the reason why they are not supported."""
    last = name.rpartition(".")[2].lower()
    if type(module).__module__.startswith("moe_ext."):
        return Found(module, "other", "moe_ext", reason=f"it is a moe_ext.{type(module).__name__} already")
    if ("expert" not in last and "expert" not in type(module).__name__.lower()) or "shared" in last:
        return None
    stacks = [f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None and p.dim() == 3]
    if stacks:
        return Found(module, "other", "stacked", reason=f"{', '.join(stacks)} are no two or three matrices per expert beside a router")
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) > 1:
        one = next(iter(module._modules.values()))
        reason = f"its experts ({type(one).__name__}) are not alike MLPs of two or three linear layers beside a router"
        return Found(module, "other", type(module).__name__, reason=reason)
    if any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return Found(module, "other", "unknown", reason="its weights are neither stacked in three dimensions nor a list of MLPs")
    return None

"""Whether the experts of a list are MLPs of one kind, so that one formula holds for all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..formulas import activation_name
from ..run import bitsandbytes, listed
from ..sandbox import isolated
from ..state import Copies
from ..usable import Refused, require_own_method


def are_experts(container: nn.Module) -> bool:
    """Several modules of one class, each of two or three linear layers and things without parameters."""
    experts = listed.members(container)
    return len(experts) > 1 and len({type(e) for e in experts}) == 1 and len(linears(experts[0])) > 0


def linears(expert: nn.Module) -> dict[str, Any]:
    """The linear layers of one expert by name; none where it is something else than two or three of them without other parameters."""
    if type(expert).__module__.startswith("torch.nn.") or expert._parameters:
        return {}
    found = {n: m for n, m in expert._modules.items() if m is not None and hasattr(m, "in_features") and hasattr(m, "out_features")}
    others = [m for n, m in expert._modules.items() if m is not None and n not in found]
    return found if len(found) in (2, 3) and not any(True for m in others for _ in m.parameters()) else {}


def require_alike(container: nn.Module, label: str) -> None:
    """Raises Refused for a list whose experts differ, or do more than linear layers and an activation. label: their name in the reason."""
    experts = listed.members(container)
    for name, layer in linears(experts[0]).items():
        base: Any = getattr(layer, "base_layer", layer)  # below an adapter
        if type(base).__module__.startswith("bitsandbytes.") and not bitsandbytes.is_quantized(base):
            raise Refused(f"{label}.0.{name} is a {type(base).__name__} of bitsandbytes; of its layers only Linear4bit is supported")
    first = _shapes(experts[0])
    for i, expert in enumerate(experts):
        found = linears(expert)
        for name, *_ in first:
            if name not in found and not hasattr(child := getattr(expert, name, None), "in_features"):
                raise Refused(f"{label}.{i}.{name} is a {type(child).__name__}, not a linear layer")
        if _shapes(expert) != first:
            raise Refused(f"{label}.{i} differs in shapes or biases from {label}.0")
        if i and (difference := _differs(experts[0], expert)) is not None:
            raise Refused(f"{label}.{i} has another {difference} than {label}.0")
        try:
            require_own_method(expert)
        except Refused as refused:
            raise type(refused)(f"{label}.{i}: {refused}") from None
        for name, part in expert._modules.items():
            if isinstance(part, nn.Dropout) and part.p > 0:
                raise Refused(f"{label}.{i}.{name} drops out with p={part.p}, between its projections")


def _shapes(expert: nn.Module) -> list[tuple[str, int, int, bool]]:
    return [(n, m.in_features, m.out_features, m.bias is not None) for n, m in linears(expert).items()]


def _differs(first: nn.Module, other: nn.Module) -> str | None:
    """The part or the number in which two experts of one class differ; whole numbers may count them."""
    layers = linears(first)
    parts = [("", first, other), *((n, first._modules[n], other._modules.get(n)) for n in first._modules if n not in layers)]
    for name, a, b in parts:
        if a is None or b is None or type(a) is not type(b):
            return name
        for key, value in vars(a).items():
            if isinstance(value, (bool, float, str)) and key != "training" and vars(b).get(key) != value:
                return f"{name}.{key}".removeprefix(".")
    return None


def require_known_activation(container: nn.Module) -> None:
    """Raises Refused for a list whose experts have an `act_fn` that is none of ours, or several of them."""
    names: dict[int, str] = {}
    copies = Copies()
    with isolated(container.parameters()):
        for expert in listed.members(container):
            act_fn = getattr(expert, "act_fn", None)
            if act_fn is not None and id(act_fn) not in names:
                name = activation_name(copies.of(act_fn))
                if name is None:
                    raise Refused(f"act_fn {getattr(act_fn, '__name__', type(act_fn).__name__)} of its experts is not known")
                names[id(act_fn)] = name
    if len(set(names.values())) > 1:
        raise Refused(f"its experts have different activations: {', '.join(sorted(set(names.values())))}")

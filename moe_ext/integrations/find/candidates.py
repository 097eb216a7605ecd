"""Where the routing of experts without transformers' decorator is, and what they may compute: candidates for the proof.

The module around the experts is run on a few tokens, in training and in evaluation, while the methods that receive routing, and the
loops over experts, are watched. Everything that fits what was seen is a candidate, the likely ones first.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formulas import Formula, plain_candidates
from ..run import bitsandbytes, listed, loop_rewrite, stacks
from ..run.listed import PROJECTION_NAMES, Listed
from ..run.patch import Cut, Experts, Linear, parameters_of
from ..run.routing import Routing, readings
from ..run.stacks import Reader
from ..sandbox import frozen, same_random
from .modules import Found, linears


class NotFound(Exception):
    """Why nothing was found that could be proven."""


@dataclass
class Place:
    """A method, or a loop in one, that has the routing: the values it had on a run, and the modes in which it is reached."""

    attribute: str
    values: dict[str, Any]
    modes: tuple[bool, ...]  # training
    loop: int | None = None
    nones: int = 0  # further arguments of the owner, which it takes as None
    dims: int = 3  # of the hidden states that it takes


def places(found: Found, tokens: int) -> list[Place]:
    """Where to cut in, one place for each way that training and evaluation take; raises NotFound."""
    assert found.owner is not None
    names = ["forward"] if found.owner is not found.module else _methods(type(found.module))
    errors: list[str] = []
    more = dict.fromkeys((0, len(parameters_of(type(found.owner), "forward")) - 1))
    for hidden, nones, rows in itertools.product(_hidden_sizes(found), more, (False, True)):
        x = _tokens(found, hidden, tokens)
        args = (x[0] if rows else x, *(None for _ in range(nones)))
        seen = {}
        for mode in (True, False):
            try:
                seen[mode] = _watch(found, names, args, mode)
            except Exception as error:  # it needs more than hidden states, or others: nothing can be seen of it
                errors.append(f"{type(found.owner).__name__} cannot be run on hidden states alone ({type(error).__name__}: {error})")
        if seen:
            return _by_mode(found, seen, args)
    raise NotFound(errors[0] if errors else "its sizes fit no hidden size")


def _by_mode(found: Found, seen: dict[bool, dict[str, dict[str, Any]]], args: tuple[Any, ...]) -> list[Place]:
    merged: list[Place] = []
    for mode, calls in seen.items():
        place = next((Place(name, values, (mode,)) for name, values in calls.items()), None)
        place = place or _loop(found, args, mode)
        same = next((p for p in merged if (p.attribute, p.loop) == (place.attribute, place.loop)), None)
        if same is None:
            merged.append(place)
        else:
            same.modes += place.modes
    return merged


def candidates(found: Found, place: Place) -> Iterator[Cut]:
    """Every cut at `place` that the shapes allow, to be proven."""
    cls, experts, identity = type(found.module), *_count(found)
    names = parameters_of(cls, place.attribute)
    for hidden in _hidden_sizes(found):
        for reader, formulas in _weights(found, hidden):
            count = experts or _experts_of(reader, found)
            ways: list[tuple[loop_rewrite.Loop | None, Routing]]
            if place.loop is None:
                ways = [(None, r) for r in readings(place.values, hidden, count, identity)]
            else:
                ways = list(
                    loop_rewrite.candidates(cls, place.attribute, found.container, place.loop, place.values, hidden, count, identity)
                )
            for (loop, routing), formula in itertools.product(ways, formulas):
                yield Experts(place.attribute, _fresh(reader), formula, routing, names, loop)


def linear_candidates(child: str, module: nn.Module) -> Iterator[Linear]:
    """Both directions of a grouped linear layer."""
    name = next(name for name, p in module._parameters.items() if p is not None)
    yield from (Linear(child, name, transposed) for transposed in (False, True))


def adapted(cut: Cut) -> Cut:
    """The same cut for another module of the same class."""
    if isinstance(cut, Experts):
        return replace(cut, reader=_fresh(cut.reader))
    return cut


def _fresh(reader: Reader | Listed) -> Reader | Listed:
    return Listed(reader.container, reader.projections) if isinstance(reader, Listed) else reader


# ------------------------------------------------------------------------------------------------------------------------- weights
def _weights(found: Found, hidden: int) -> Iterator[tuple[Reader | Listed, list[Formula]]]:
    if found.kind == "stacked":
        for reader, spec in stacks.layouts(found.module, hidden):
            formulas = list(plain_candidates(found.module, spec.gated))
            yield reader, [Formula(stacks.with_formula(spec, f.spec), f.own_gate) for f in formulas]
        return
    expert = listed.members(listed.container_of(found.module, found.container))[0]
    names = linears(expert)
    assert names is not None
    for projections in _projections(names, hidden):
        yield Listed(found.container, projections), list(plain_candidates(expert, projections[0] is not None))


def _projections(layers: dict[str, Any], hidden: int) -> Iterator[tuple[str | None, str, str]]:
    orders: list[tuple[str | None, ...]] = []
    if len(layers) == 3:
        orders = [names for names in PROJECTION_NAMES if set(names) == set(layers)]
        orders += [names for names in itertools.permutations(layers) if names not in orders]
    else:
        orders = [(None, *names) for names in itertools.permutations(layers)]
    for gate, up, down in orders:
        assert up is not None and down is not None
        a, b = layers[up], layers[down]
        fits = a.in_features == hidden == b.out_features and a.out_features == b.in_features
        if fits and (gate is None or (layers[gate].in_features, layers[gate].out_features) == (a.in_features, a.out_features)):
            yield gate, up, down


def _hidden_sizes(found: Found) -> list[int]:
    if found.kind == "listed":
        layers = linears(listed.members(listed.container_of(found.module, found.container))[0])
        assert layers is not None
        sizes = [n for m in layers.values() for n in (m.in_features, m.out_features)]  # type: ignore[attr-defined]
    else:
        shapes = [t.shape for t in stacks.stacks(found.module).values()]
        depth = max(len(s) for s in shapes)
        sizes = [n for s in shapes if len(s) == depth for n in (s[1:] if depth == 3 else reversed(s))]
    return list(dict.fromkeys(int(n) for n in sizes))  # type: ignore[call-overload]


def _count(found: Found) -> tuple[int, bool]:
    """The number of experts, 0 if only a reader can tell, and whether there may be some that return their input."""
    if found.kind == "listed":
        container = listed.container_of(found.module, found.container)
        return len(listed.members(container)), listed.identities(container) > 0
    rows = {t.shape[0] for t in stacks.stacks(found.module).values() if t.dim() == 3}
    return 0, len(rows) > 1 or any(type(child) is nn.Identity for child in found.module.children())


def _experts_of(reader: Reader | Listed, found: Found) -> int:
    weights = reader.read(found.module)
    if isinstance(weights, str):
        raise NotFound(weights)
    return weights.num_experts


# ------------------------------------------------------------------------------------------------------------------------ watching
def _methods(cls: type[nn.Module]) -> list[str]:
    """Methods of a block's own that take several arguments."""
    named = [name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not hasattr(nn.Module, name) and not name.startswith("__")]
    return [name for name in named if len(parameters_of(cls, name)) > 1]


def _watch(found: Found, names: Sequence[str], args: tuple[Any, ...], training: bool) -> dict[str, dict[str, Any]]:
    """Runs the owner and returns, by method, the arguments of the last call that returned something like hidden states."""
    calls: dict[str, dict[str, Any]] = {}
    assert found.owner is not None
    owner: nn.Module = found.owner
    module, cls = found.module, type(found.module)

    def recorder(name: str) -> Any:
        signature = inspect.signature(getattr(cls, name))

        def record(*given: Any, **named: Any) -> Any:
            out = getattr(cls, name)(module, *given, **named)
            values = dict(signature.bind(module, *given, **named).arguments)
            del values[next(iter(signature.parameters))]
            if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == args[0].shape[-1]:
                calls[name] = values
            return out

        return record

    owner.train(training)
    with _instead(module, {name: recorder(name) for name in names}), torch.no_grad(), frozen(owner), same_random():
        type(owner).forward(owner, args[0].clone(), *args[1:])
    return calls


def _loop(found: Found, args: tuple[Any, ...], training: bool) -> Place:
    """The loop over experts in the block's forward that is reached in this mode."""
    if found.owner is not found.module:
        raise NotFound(f"its forward is not called with a routing by {type(found.owner).__name__}")
    module: nn.Module = found.module
    try:
        count = loop_rewrite.find(type(module), "forward", found.container)
        module.train(training)
        for number in range(count):
            with torch.no_grad(), frozen(module), same_random():
                values = loop_rewrite.observe(module, "forward", found.container, number, args[0].clone(), *args[1:])
            if values:
                read = loop_rewrite.tensors_read(module, "forward", found.container, number)
                if read:
                    raise NotFound(f"its loop reads {', '.join(read)} beside the experts")
                return Place("forward", values, (training,), number, len(args) - 1, args[0].dim())
    except loop_rewrite.Uncopied as error:
        raise NotFound(str(error)) from error
    raise NotFound("its forward has no loop over its experts that could be replaced")


@contextlib.contextmanager
def _instead(module: nn.Module, methods: dict[str, Any]) -> Iterator[None]:
    before = {name: module.__dict__[name] for name in methods if name in module.__dict__}
    try:
        module.__dict__.update(methods)
        yield
    finally:
        for name in methods:
            del module.__dict__[name]
        module.__dict__.update(before)


def _tokens(found: Found, hidden: int, tokens: int) -> Tensor:
    """hidden_states `[1, T, H]` like the first floating parameter of the experts, or of what is around them."""
    assert found.owner is not None
    experts = listed.container_of(found.module, found.container)
    p = next((p for m in (experts, found.owner) for p in m.parameters() if p.is_floating_point()), None)
    p = p if p is not None else bitsandbytes.example(experts)
    if p is None:
        raise NotFound("it has no floating-point parameter")
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, tokens, hidden, generator=generator, dtype=torch.float64, device="cpu").to(p.device, p.dtype)

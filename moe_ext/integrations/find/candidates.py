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
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..run import bitsandbytes, loop_rewrite
from ..run.listed import ListedReader
from ..run.patch import LinearReplacement, LoopReplacement, MethodReplacement, Reader, parameters_of
from ..run.routing import readings
from ..sandbox import frozen, same_random, set_training
from ..usable import Refused
from .modules import RoutedExperts


@dataclass
class MethodSite:
    """A method that has the routing in its arguments: the values they had on a run, and the modes in which it is reached (training)."""

    attribute: str
    values: dict[str, Any]
    modes: tuple[bool, ...]


@dataclass
class LoopSite:
    """A loop over experts in a method: its number, the variables before it on a run, and the modes in which it is reached (training).

    nones: how many further arguments the method takes as None. dims: of the hidden states that it takes.
    """

    attribute: str
    values: dict[str, Any]
    modes: tuple[bool, ...]
    number: int
    nones: int
    dims: int


Site: TypeAlias = MethodSite | LoopSite


def sites(found: RoutedExperts, tokens: int) -> Iterator[list[Site]]:
    """Where ours can take over, for each hidden size with which the module around the experts can be run: one site for each way that
    training and evaluation take. With a wrong size too something may run, as in a block that reshapes by the size it knows.

    Raises:
        Refused: Behind the last, if there was none.
    """
    names = ["forward"] if found.owner is not found.module else _methods(type(found.module))
    errors: list[str] = []
    refused: Refused | None = None
    some = False
    for hidden in found.sizes():
        try:
            one = _sites_of(found, names, hidden, tokens, errors)
        except Refused as error:
            refused = refused or error
        else:
            some = some or bool(one)
            if one:
                yield one
    if not some:
        raise refused or Refused(errors[0] if errors else "its sizes fit no hidden size")


def _sites_of(found: RoutedExperts, names: Sequence[str], hidden: int, tokens: int, errors: list[str]) -> list[Site]:
    """The sites for this hidden size; none, and `errors` says why, where nothing runs with it."""
    more = dict.fromkeys((0, len(parameters_of(type(found.owner), "forward")) - 1))
    for nones, rows in itertools.product(more, (False, True)):
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
    return []


def _by_mode(found: RoutedExperts, seen: dict[bool, dict[str, dict[str, Any]]], args: tuple[Any, ...]) -> list[Site]:
    merged: list[Site] = []
    for mode, calls in seen.items():
        method = next((MethodSite(name, values, (mode,)) for name, values in calls.items()), None)
        site = method or _loop(found, args, mode)
        same = next((s for s in merged if _identity(s) == _identity(site)), None)
        if same is None:
            merged.append(site)
        else:
            same.modes += site.modes
    return merged


def _identity(site: Site) -> tuple[str, int | None]:
    return site.attribute, site.number if isinstance(site, LoopSite) else None


def candidates(found: RoutedExperts, site: Site) -> Iterator[MethodReplacement]:
    """Every replacement at `site` that the shapes allow, to be proven."""
    cls, identity = type(found.module), found.may_return_inputs()
    names = parameters_of(cls, site.attribute)
    for hidden in found.sizes():
        for reader, formulas in found.candidates(hidden):
            experts = found.count() or reader.read(found.module).num_experts
            if isinstance(site, MethodSite):
                for routing, formula in itertools.product(readings(site.values, hidden, experts, identity), formulas):
                    yield MethodReplacement(site.attribute, names, _fresh(reader), formula, routing)
            elif isinstance(reader, ListedReader):
                loops = loop_rewrite.candidates(cls, site.attribute, found.container, site.number, site.values, hidden, experts, identity)
                for (loop, routing), formula in itertools.product(loops, formulas):
                    yield LoopReplacement(site.attribute, names, _fresh_list(reader), formula, routing, loop=loop)


def linear_candidates(child: str, module: nn.Module) -> Iterator[LinearReplacement]:
    """Both directions of a grouped linear layer."""
    name = next(name for name, p in module._parameters.items() if p is not None)
    yield from (LinearReplacement(child, name, transposed) for transposed in (False, True))


def adapted(replacement: MethodReplacement) -> MethodReplacement:
    """The same replacement for another module of the same class."""
    return replace(replacement, reader=_fresh(replacement.reader))


def _fresh(reader: Reader) -> Reader:
    """A reader without what it remembers of a module."""
    return _fresh_list(reader) if isinstance(reader, ListedReader) else reader


def _fresh_list(reader: ListedReader) -> ListedReader:
    return ListedReader(reader.container, reader.projections)


# ------------------------------------------------------------------------------------------------------------------------ watching
def _methods(cls: type[nn.Module]) -> list[str]:
    """Methods of a block's own that take several arguments."""
    named = [name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not hasattr(nn.Module, name) and not name.startswith("__")]
    return [name for name in named if len(parameters_of(cls, name)) > 1]


def _watch(found: RoutedExperts, names: Sequence[str], args: tuple[Any, ...], training: bool) -> dict[str, dict[str, Any]]:
    """Runs the owner and returns, by method, the arguments of the last call that returned something like hidden states."""
    calls: dict[str, dict[str, Any]] = {}
    owner, module, cls = found.owner, found.module, type(found.module)

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

    set_training([m.__dict__ for m in owner.modules()], training)
    with torch.no_grad(), frozen(owner), same_random(), _instead(module, {name: recorder(name) for name in names}):
        type(owner).forward(owner, args[0].clone(), *args[1:])
    return calls


def _loop(found: RoutedExperts, args: tuple[Any, ...], training: bool) -> LoopSite:
    """The loop over experts in the block's forward that is reached in this mode."""
    if found.owner is not found.module:
        raise Refused(f"its forward is not called with a routing by {type(found.owner).__name__}")
    module = found.module
    count = loop_rewrite.find(type(module), "forward", found.container)
    set_training([m.__dict__ for m in module.modules()], training)
    for number in range(count):
        with torch.no_grad(), frozen(module), same_random():
            values = loop_rewrite.observe(module, "forward", found.container, number, args[0].clone(), *args[1:])
        if values:
            read = loop_rewrite.tensors_read(module, "forward", found.container, number)
            if read:
                raise Refused(f"its loop reads {', '.join(read)} beside the experts")
            return LoopSite("forward", values, (training,), number, len(args) - 1, args[0].dim())
    raise Refused("its forward has no loop over its experts that could be replaced")


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


def _tokens(found: RoutedExperts, hidden: int, tokens: int) -> Tensor:
    """hidden_states `[1, T, H]` like the first floating parameter of the experts, or of what is around them."""
    experts = found.experts()
    p = next((p for m in (experts, found.owner) for p in m.parameters() if p.is_floating_point()), None)
    p = p if p is not None else bitsandbytes.example(experts)
    if p is None:
        raise Refused("it has no floating-point parameter")
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, tokens, hidden, generator=generator, dtype=torch.float64, device="cpu").to(p.device, p.dtype)

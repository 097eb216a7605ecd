"""Which layouts the shapes of a module's stacked parameters, or of its experts' linear layers, allow: guesses, which the proof decides on.

Where shapes fit several (square matrices, gate and up), each is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...experts import ExpertSpec
from ..run.listed import PROJECTION_NAMES
from ..run.stacks import SeparateReader, StackedReader, stacks


def has_stacks(module: nn.Module) -> bool:
    """Whether `layouts` may find something: two matrices per expert, or three flattened ones."""
    shapes = [t.shape for t in stacks(module).values()]
    cubes = [s for s in shapes if len(s) == 3 and s[0] > 1]
    flat = [s for s in shapes if len(s) == 2]
    return len(cubes) in (2, 3) or (not cubes and len(flat) == 3 and len(set(flat)) == 1)


def layouts(module: nn.Module, hidden: int) -> Iterator[tuple[StackedReader | SeparateReader, ExpertSpec]]:
    """Every layout that the shapes of the module's stacks allow for inputs of `hidden` numbers; the activation is left open."""
    cubes = {name: t for name, t in stacks(module).items() if t.dim() == 3}
    flat = {name: t for name, t in stacks(module).items() if t.dim() == 2}
    if len(cubes) == 2:
        for (first, p), (second, q) in itertools.permutations(cubes.items()):
            for transposed, interleaved, gated in itertools.product((False, True), (False, True), (True, False)):
                spec = ExpertSpec(gated=gated, transposed=transposed, interleaved=interleaved and gated)
                if interleaved <= gated and _fits(p, q, hidden, spec):
                    yield from ((StackedReader(first, second, *biases), spec) for biases in _biases(flat, p, q, transposed))
    elif len(cubes) == 3:
        yield from _separate(cubes, hidden, None)
    elif len(flat) == 3 and not cubes:
        rows = next(iter(flat.values())).shape[0]
        for experts in dict.fromkeys(_whole_numbers(module)):
            if 1 < experts < rows and rows % experts == 0:
                yield from _separate({name: t.view(experts, -1, t.shape[1]) for name, t in flat.items()}, hidden, experts)


def _fits(p: Tensor, q: Tensor, hidden: int, spec: ExpertSpec) -> bool:
    wide, back = (p, q) if not spec.transposed else (p.mT, q.mT)
    return wide.shape[2] == hidden == back.shape[1] and wide.shape[1] == (1 + spec.gated) * back.shape[2] and p.shape[0] >= q.shape[0]


def _biases(flat: dict[str, Tensor], p: Tensor, q: Tensor, transposed: bool) -> Iterator[tuple[str | None, str | None]]:
    axis = 2 if transposed else 1
    first = [name for name, t in flat.items() if t.shape == (p.shape[0], p.shape[axis])]
    second = [name for name, t in flat.items() if t.shape == (q.shape[0], q.shape[axis])]
    if not flat:
        yield None, None
    yield from ((a, b) for a in first for b in second if a != b)
    if len(flat) == 1:
        yield from ((a, None) for a in first)
        yield from ((None, b) for b in second)


def _separate(cubes: dict[str, Tensor], hidden: int, experts: int | None) -> Iterator[tuple[StackedReader | SeparateReader, ExpertSpec]]:
    for names in itertools.permutations(cubes):
        for of_inputs, of_output in itertools.product((False, True), repeat=2):
            transposed = (of_inputs, of_inputs, of_output)
            gate, up, down = ((cubes[n].mT if t else cubes[n]).shape for n, t in zip(names, transposed, strict=True))
            if gate == up and gate[2] == hidden == down[1] and gate[1] == down[2]:
                yield SeparateReader((names[0], names[1], names[2]), transposed, experts), ExpertSpec()


def _whole_numbers(module: nn.Module) -> Iterator[int]:
    for part in (module, *module.children()):
        yield from (value for value in vars(part).values() if type(value) is int)


def with_formula(spec: ExpertSpec, other: ExpertSpec) -> ExpertSpec:
    """The layout of `spec` with the activation of `other`."""
    return replace(other, transposed=spec.transposed, interleaved=spec.interleaved)


def projections(layers: dict[str, Any], hidden: int) -> Iterator[tuple[str | None, str, str]]:
    """Every way in which the linear layers of an expert may be its gate (None when ungated), up and down projection."""
    orders: dict[tuple[str | None, str, str], None] = {}
    if len(layers) == 3:
        orders |= {names: None for names in PROJECTION_NAMES if set(names) == set(layers)}
        orders |= dict.fromkeys((gate, up, down) for gate, up, down in itertools.permutations(layers))
    else:
        orders |= {(None, up, down): None for up, down in itertools.permutations(layers)}
    for gate, up, down in orders:
        a, b = layers[up], layers[down]
        fits = a.in_features == hidden == b.out_features and a.out_features == b.in_features
        if fits and (gate is None or (layers[gate].in_features, layers[gate].out_features) == (a.in_features, a.out_features)):
            yield gate, up, down

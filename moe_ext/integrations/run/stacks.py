"""Reading the weights of experts that are stacked in parameters, with or without transformers' decorator.

A layout is a guess from the shapes: where they fit several (square matrices, gate and up), each is tried, and the proof decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...experts import ExpertSpec, ExpertWeights
from ..usable import autocast_is_on


@dataclass(frozen=True)
class Stacked:
    """`gate_up` `[E, 2I, H]` and `down` `[E, H, I]`, or both transposed, by their names (dotted below the module), and their biases."""

    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None

    def read(self, module: nn.Module, like: Tensor | None = None) -> ExpertWeights | str:
        gate_up, down, gate_up_bias, down_bias = (
            None if name is None else _tensor(module, name) for name in (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        )
        if gate_up is None or down is None:
            return "a weight is missing"
        if gate_up.shape[0] != down.shape[0]:  # rows that no expert uses: room for experts that compute nothing
            gate_up = gate_up[: down.shape[0]]
        weights = ExpertWeights(gate_up_proj=gate_up, down_proj=down, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return unusable(weights.tensors(), like) or weights


@dataclass(frozen=True)
class Separate:
    """gate (None when ungated), up and down as three parameters `[E, ., .]`, or flattened `[E * ., .]` where `experts` is given.

    `transposed` says of each, in the order gate, up, down, whether its matrices are `[in, out]`.
    """

    projections: tuple[str | None, str, str]
    transposed: tuple[bool, bool, bool]
    experts: int | None = None

    def read(self, module: nn.Module, like: Tensor | None = None) -> ExpertWeights | str:
        found: list[list[Tensor] | None] = []
        for name, transposed in zip(self.projections, self.transposed, strict=True):
            if name is None:
                found.append(None)
                continue
            stack = _tensor(module, name)
            if stack is None:
                return f"{name} is missing"
            reason = unusable([stack], like)
            if reason is not None:
                return reason
            stack = stack if self.experts is None else stack.view(self.experts, -1, stack.shape[-1])
            found.append(list((stack.mT if transposed else stack).unbind()))
        gate, up, down = found
        return ExpertWeights(gate_proj=gate, up_proj=up, down_proj=down)


Reader = Stacked | Separate


def unusable(tensors: list[Tensor], like: Tensor | None) -> str | None:
    """The reason why the op cannot compute `like` with these tensors now."""
    like = tensors[0] if like is None else like
    any_dtype = autocast_is_on(like.device)
    for t in tensors:
        if is_traceable_wrapper_subclass(t):
            return f"a weight is a {type(t).__name__}, not a plain tensor"
        if t.numel() == 0:
            return "a weight is empty: it is sharded by ZeRO-3, or not loaded"
        if t.device != like.device or (t.dtype != like.dtype and not any_dtype) or not t.is_floating_point():
            return f"a weight is {t.dtype} on {t.device}, where {like.dtype} on {like.device} is needed"
    return None


def stacks(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that hold one matrix or vector per expert: 3-D and 2-D ones of the module and of its own children."""
    found = {name: p for name, p in module._parameters.items() if p is not None and p.dim() in (2, 3)}
    for child_name, child in module._modules.items():
        if child is not None and not type(child).__module__.startswith("torch.nn."):
            found |= {f"{child_name}.{name}": p for name, p in child._parameters.items() if p is not None and p.dim() in (2, 3)}
    return found


def has_stacks(module: nn.Module) -> bool:
    """Whether `layouts` may find something: two matrices per expert, or three flattened ones."""
    shapes = [t.shape for t in stacks(module).values()]
    cubes = [s for s in shapes if len(s) == 3 and s[0] > 1]
    flat = [s for s in shapes if len(s) == 2]
    return len(cubes) in (2, 3) or (not cubes and len(flat) == 3 and len(set(flat)) == 1)


def layouts(module: nn.Module, hidden: int) -> Iterator[tuple[Reader, ExpertSpec]]:
    """Every layout that the shapes of the module's stacks allow for inputs of `hidden` numbers; the activation is left open."""
    cubes = {name: t for name, t in stacks(module).items() if t.dim() == 3}
    flat = {name: t for name, t in stacks(module).items() if t.dim() == 2}
    if len(cubes) == 2:
        for (first, p), (second, q) in itertools.permutations(cubes.items()):
            for transposed, interleaved, gated in itertools.product((False, True), (False, True), (True, False)):
                spec = ExpertSpec(gated=gated, transposed=transposed, interleaved=interleaved and gated)
                if interleaved <= gated and _fits(p, q, hidden, spec):
                    yield from ((Stacked(first, second, *biases), spec) for biases in _biases(flat, p, q, transposed))
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


def _separate(cubes: dict[str, Tensor], hidden: int, experts: int | None) -> Iterator[tuple[Reader, ExpertSpec]]:
    for names in itertools.permutations(cubes):
        for of_inputs, of_output in itertools.product((False, True), repeat=2):
            transposed = (of_inputs, of_inputs, of_output)
            gate, up, down = ((cubes[n].mT if t else cubes[n]).shape for n, t in zip(names, transposed, strict=True))
            if gate == up and gate[2] == hidden == down[1] and gate[1] == down[2]:
                yield Separate((names[0], names[1], names[2]), transposed, experts), ExpertSpec()


def _whole_numbers(module: nn.Module) -> Iterator[int]:
    for part in (module, *module.children()):
        yield from (value for value in vars(part).values() if type(value) is int)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        module = module._modules[part]  # type: ignore[assignment]
    t = module._parameters.get(last)
    return t if t is not None else getattr(module, last, None)  # what a parametrization computes


def with_formula(spec: ExpertSpec, other: ExpertSpec) -> ExpertSpec:
    """The layout of `spec` with the activation of `other`."""
    return replace(other, transposed=spec.transposed, interleaved=spec.interleaved)


def is_meta(weights: ExpertWeights) -> bool:
    return any(t.device == torch.device("meta") for t in weights.tensors())

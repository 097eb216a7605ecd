"""Proof that a set of experts computes what `moe_ext` will compute in its place, before anything is replaced.

On a few random tokens, forward and backward, in the block's own dtype: truth is the formula in float64, plain the formula in
PyTorch (`moe_ext.reference`), old the block's own code, new ours. A block passes when old obeys the error rule (so the formula is
what the block computes) and new obeys it. All code runs on a copy of the block (`sandbox`), so the block stays as it is: its
parameters, buffers, attributes, gradients and flags; and no hook of it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..experts import ExpertWeights
from ..integrations.find import candidates
from ..integrations.find.candidates import LoopSite, Site
from ..integrations.find.modules import Found, RoutedExperts, grouped_linears
from ..integrations.formulas import Formula
from ..integrations.run import decorated
from ..integrations.run.patch import LinearReplacement, LoopReplacement, MethodReplacement, Replacement
from ..integrations.sandbox import Box, frozen, run_in_sandbox, set_training
from ..integrations.usable import Refused
from .call import prove_call, prove_linear
from .loop import prove_loop
from .rule import (
    ACTIVE_EXPERTS,
    TOKENS,
    Proof,
    Results,
    Runs,
    attempt,
    count_of,
    detached,
    gradients,
    judge_draws,
    prove_weights,
    sizes_of,
    smooth_tokens,
    subset,
    zeros_for_none,
)

META = "could not be proven: its weights are on the meta device"


# -------------------------------------------------------------------------------------------------------------- decorated experts
def prove_decorated(module: nn.Module, formula: Formula) -> Proof:
    """Old is the loop that the class was written with."""

    def prove(box: Box) -> Proof:
        module = box.module
        weights = decorated.read_weights(module)
        trainable = any(t.requires_grad for t in weights.tensors())
        if any(t.is_meta for t in weights.tensors()):
            return Proof(META)
        spec = formula.resolve(module)
        weights = detached(weights)
        like, hidden, inner = sizes_of(weights, spec)
        experts = sorted({0, weights.num_experts // 2, weights.num_experts - 1})[:ACTIVE_EXPERTS]
        some = subset(weights, experts)

        def by(dtype: torch.dtype, compute: Callable[..., Tensor], x: Tensor, w: Tensor, grad: Tensor) -> Results:
            inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
            out = compute(*inputs)
            return {"output": out} | zeros_for_none(["hidden_states", "top_k_weights"], inputs, gradients(out, inputs, grad))

        def draw(number: int) -> Runs:
            x, index, w, grad = smooth_tokens(some, spec, count_of(inner), number)
            everywhere = torch.tensor(experts, device=like.device)[index]

            def plain(a: Tensor, b: Tensor) -> Tensor:
                return reference.grouped_experts(a, index, b, some, spec)

            with frozen(module):
                old = by(like.dtype, lambda a, b: decorated.run_implementation(module, None, a, everywhere, b), x, w, grad)
            new = by(like.dtype, lambda a, b: functional.grouped_experts(a, everywhere, b, weights, spec), x, w, grad)
            return Runs(old, new, by(like.dtype, plain, x, w, grad), by(torch.float64, plain, x, w, grad))

        proof = judge_draws(draw, terms=hidden + inner)
        if proof.reason is not None or not trainable:
            return proof
        more = prove_weights(weights, spec, trainable)
        return Proof(more.reason, proof.figures | more.figures)

    return run_in_sandbox(module, prove)


# --------------------------------------------------------------------------------------------------------- experts without decorator
def search_and_prove(found: RoutedExperts, hint: Sequence[MethodReplacement]) -> tuple[Sequence[Replacement], Proof]:
    """The replacements that are proven for `found`, one for each way that training and evaluation take; the proof says why there is none.

    hint: what was proven for another module of the same class is tried first.
    """
    if _is_meta(found):
        return [], Proof(META)

    def search(box: Box) -> tuple[Sequence[Replacement], Proof]:
        copied = replace(found, module=box.of(found.module), owner=box.module)
        replacements, proof = _search(copied, hint)
        if not replacements and grouped_linears(copied.module):
            # Experts that are handed no routing, but have a layer for each projection that is handed rows and counts.
            linears, linear_proof = _prove_linears(copied)
            if linears:
                return linears, linear_proof
        return [_without_the_copy(r) for r in replacements], proof

    try:
        return run_in_sandbox(found.owner, search)
    except Refused as refused:
        return [], Proof(str(refused))


def _without_the_copy(replacement: MethodReplacement) -> MethodReplacement:
    """The replacement for the module itself: its reader remembers no module that it has read."""
    return replace(replacement, reader=copy.copy(replacement.reader))


def prove_linears(found: Found) -> tuple[Sequence[Replacement], Proof]:
    """The replacements of the grouped linear layers of a block, if all of them are proven."""
    if _is_meta(found):
        return [], Proof(META)
    try:
        return run_in_sandbox(found.module, lambda box: _prove_linears(replace(found, module=box.module)))
    except Refused as refused:
        return [], Proof(str(refused))


def _is_meta(found: Found) -> bool:
    return any(p.is_meta for p in found.module.parameters())


def _search(found: RoutedExperts, hint: Sequence[MethodReplacement]) -> tuple[list[MethodReplacement], Proof]:
    failed: Proof | None = None
    try:
        for sites in candidates.sites(found, 8 * TOKENS):
            proven, proof = _search_at(found, sites, hint)
            if proof.reason is None:
                return proven, proof
            failed = failed or proof
        return [], failed or Proof("nothing was found to prove")
    except Refused as refused:
        return [], failed or Proof(str(refused))


def _search_at(found: RoutedExperts, sites: Iterable[Site], hint: Sequence[MethodReplacement]) -> tuple[list[MethodReplacement], Proof]:
    proven: list[MethodReplacement] = []
    whole = Proof()
    for site in sites:
        known = (candidates.adapted(r) for r in hint if r.attribute == site.attribute)
        one, proof = _first(known, partial(_prove_at, found, site=site, first=False))
        if not one:
            one, proof = _first(candidates.candidates(found, site), partial(_prove_at, found, site=site, first=True))
        whole.figures |= proof.figures
        if proof.reason is not None:
            return [], Proof(proof.reason, whole.figures)
        proven += one
    return proven, whole


_R = TypeVar("_R")


def _first(possible: Iterable[_R], prove: Callable[[_R], Proof]) -> tuple[list[_R], Proof]:
    """The first candidate whose proof holds; else the first reason, which is that of the likeliest candidate."""
    reason: Proof | None = None
    for replacement in possible:
        proof = attempt(prove, replacement)
        if proof.reason is None:
            return [replacement], proof
        reason = reason or proof
    return [], reason or Proof("no layout and no routing that could be proven fits its shapes")


def _prove_at(found: RoutedExperts, replacement: MethodReplacement, site: Site, first: bool) -> Proof:
    # Where it cannot be read in one mode, as with adapters that drop out in training, its own code runs in that mode.
    weights: dict[bool, ExpertWeights] = {}
    refused: list[Refused] = []
    for mode in site.modes:
        set_training([m.__dict__ for m in found.module.modules()], mode)
        try:
            weights[mode] = replacement.reader.read(found.module)
        except Refused as error:
            refused.append(error)
    if not weights:
        raise refused[0]
    some, site = next(iter(weights.values())), replace(site, modes=tuple(weights))
    if isinstance(replacement, LoopReplacement) and isinstance(site, LoopSite):
        proof = prove_loop(found, replacement, site, some, first)
    else:
        proof = prove_call(found, replacement, site, some, first)
    if proof.reason is not None or (some.stacked and not some.fusable):
        return proof
    trainable = any(t.requires_grad for t in some.tensors()) and some.fusable
    more = prove_weights(detached(some), replacement.formula.resolve(found.module), trainable)
    return Proof(more.reason, proof.figures | more.figures)


def _prove_linears(found: Found) -> tuple[list[LinearReplacement], Proof]:
    proven: list[LinearReplacement] = []
    whole = Proof()
    for name, module in grouped_linears(found.module).items():
        one, proof = _first(candidates.linear_candidates(name, module), partial(prove_linear, module))
        whole.figures |= {f"{name}: {quantity}": report for quantity, report in proof.figures.items()}
        if proof.reason is not None:
            return [], Proof(f"{name}: {proof.reason}", whole.figures)
        proven += one
    return proven, whole

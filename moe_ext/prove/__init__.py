"""Proof that a set of experts computes what `moe_ext` will compute in its place, before anything is replaced.

On a few random tokens, forward and backward, in the block's own dtype: truth is the formula in float64, plain the formula in
PyTorch (`moe_ext.reference`), old the block's own code, new ours. A block passes when old obeys the error rule (so the formula is
what the block computes) and new obeys it. Nothing of it remains: not in the random state, buffers, gradients or flags, and no hook
of the block is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..experts import ExpertWeights
from ..integrations.find import candidates
from ..integrations.find.modules import Found, grouped_linears
from ..integrations.run import bitsandbytes, decorated
from ..integrations.run.patch import Cut, Experts
from ..integrations.run.stacks import is_meta
from ..integrations.sandbox import frozen, undisturbed
from .call import prove_call, prove_linear
from .loop import prove_loop
from .rule import (
    ACTIVE_EXPERTS,
    TOKENS,
    Proof,
    Results,
    attempt,
    away_from_kinks,
    count_of,
    detached,
    gradients,
    judge,
    prove_weights,
    sizes_of,
    subset,
    tokens_of,
    zeros_for_none,
)

META = "could not be proven: its weights are on the meta device"


# -------------------------------------------------------------------------------------------------------------- decorated experts
def prove_decorated(module: nn.Module, plan: decorated.StackedPlan) -> Proof:
    """Old is the loop that the class was written with."""
    assert plan.formula is not None
    with undisturbed(module):
        weights = decorated.read_weights(module)
        trainable = any(t.requires_grad for t in weights.tensors())
        if is_meta(weights):
            return Proof(META)
        spec = plan.formula.resolve(module)
        weights = detached(weights)
        like, hidden, inner = sizes_of(weights, spec)
        experts = sorted({0, weights.num_experts // 2, weights.num_experts - 1})[:ACTIVE_EXPERTS]
        x, index, w, grad = tokens_of(count_of(inner), hidden, len(experts), like)
        some = subset(weights, experts)
        smooth = away_from_kinks(x, some, spec)
        x, index, w, grad = (t[smooth] for t in (x, index, w, grad))
        everywhere = torch.tensor(experts, device=like.device)[index]

        def by(dtype: torch.dtype, compute: Callable[..., Tensor]) -> Results:
            inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
            out = compute(*inputs)
            return {"output": out} | zeros_for_none(["hidden_states", "top_k_weights"], inputs, gradients(out, inputs, grad))

        def formula(a: Tensor, b: Tensor) -> Tensor:
            return reference.grouped_experts(a, index, b, some, spec)

        with frozen(module):
            old = by(like.dtype, lambda a, b: decorated.run_implementation(module, None, a, everywhere, b))
        new = by(like.dtype, lambda a, b: functional.grouped_experts(a, everywhere, b, weights, spec))
        proof = judge(old, new, by(like.dtype, formula), by(torch.float64, formula), terms=hidden + inner)
        if proof.reason is not None or not trainable:
            return proof
        more = prove_weights(weights, spec, trainable)
        return Proof(more.reason, proof.figures | more.figures)


# --------------------------------------------------------------------------------------------------------- experts without decorator
def search_and_prove(found: Found, hint: list[Cut] | None) -> tuple[list[Cut], Proof]:
    """The cuts that are proven for `found`, one for each way that training and evaluation take; the proof says why there is none.

    hint: what was proven for another module of the same class is tried first.
    """
    assert found.owner is not None or found.kind == "linear"
    if any(p.is_meta for p in found.module.parameters()):
        return [], Proof(META)
    around = found.owner or found.module
    with undisturbed(around), bitsandbytes.undisturbed(around):
        if found.kind == "linear":
            return prove_linears(found)
        cuts, proof = _search(found, hint)
        if not cuts and grouped_linears(found.module):
            # Experts that are handed no routing, but have a layer for each projection that is handed rows and counts.
            linears, linear_proof = prove_linears(found)
            if linears:
                return linears, linear_proof
        return cuts, proof


def _search(found: Found, hint: list[Cut] | None) -> tuple[list[Cut], Proof]:
    try:
        places = candidates.places(found, 8 * TOKENS)
        cuts: list[Cut] = []
        whole = Proof()
        for place in places:
            known: list[Cut] = [candidates.adapted(cut) for cut in hint or [] if cut.attribute == place.attribute]
            one, proof = _first(iter(known), partial(_prove_place, found, place=place, first=False))
            if not one:
                one, proof = _first(candidates.candidates(found, place), partial(_prove_place, found, place=place, first=True))
            whole.figures |= proof.figures
            if proof.reason is not None:
                return [], Proof(proof.reason, whole.figures)
            cuts += one
        return cuts, whole
    except candidates.NotFound as error:
        return [], Proof(str(error))


def _first(candidates: Iterator[Any], prove: Callable[[Any], Proof]) -> tuple[list[Cut], Proof]:
    """The first candidate whose proof holds; else the first reason, which is that of the likeliest candidate."""
    reason: Proof | None = None
    for cut in candidates:
        proof = attempt(prove, cut)
        if proof.reason is None:
            return [cut], proof
        reason = reason or proof
    return [], reason or Proof("no layout and no routing that could be proven fits its shapes")


def _prove_place(found: Found, cut: Experts, place: candidates.Place, first: bool) -> Proof:
    # Where it cannot be read in one mode, as with adapters that drop out in training, its own code runs in that mode.
    seen = {mode: _read(found, cut, mode) for mode in place.modes}
    readable = tuple(mode for mode, weights in seen.items() if isinstance(weights, ExpertWeights))
    if not readable:
        return Proof(str(next(iter(seen.values()))))
    weights, place = seen[readable[0]], replace(place, modes=readable)
    assert isinstance(weights, ExpertWeights)
    prove = prove_loop if cut.loop is not None else prove_call
    proof = prove(found, cut, place, weights, first)
    if proof.reason is not None:
        return proof
    trainable = any(t.requires_grad for t in weights.tensors()) and weights.fusable
    if not weights.fusable and weights.stacked:
        return proof
    more = prove_weights(detached(weights), cut.formula.resolve(found.module), trainable)
    return Proof(more.reason, proof.figures | more.figures)


def _read(found: Found, cut: Experts, training: bool) -> ExpertWeights | str:
    found.module.train(training)
    return cut.reader.read(found.module)


def prove_linears(found: Found) -> tuple[list[Cut], Proof]:
    cuts: list[Cut] = []
    whole = Proof()
    for name, module in grouped_linears(found.module).items():
        one, proof = _first(candidates.linear_candidates(name, module), partial(prove_linear, module))
        whole.figures |= {f"{name}: {quantity}": report for quantity, report in proof.figures.items()}
        if proof.reason is not None:
            return [], Proof(f"{name}: {proof.reason}", whole.figures)
        cuts += one
    return cuts, whole

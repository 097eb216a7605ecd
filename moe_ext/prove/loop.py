"""Proof of blocks that route inline and loop over their experts: the whole block, with its loop replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional, reference
from ..experts import ExpertWeights
from ..integrations import search
from ..integrations.detect import Found
from ..integrations.patch import Experts, Refusal
from ..integrations.quiet import frozen, replaced, same_random
from .rule import ACTIVE_EXPERTS, Proof, Results, count_of, gradients, judge, normal, sizes_of, subset


def prove_loop(found: Found, cut: Experts, place: search.Place, weights: ExpertWeights) -> Proof:
    """A whole block, in each mode that reaches the loop: all it returns, the random numbers it draws, and the gradients of the input,
    of its other parameters (router, shared experts) and of the busiest experts.
    """
    block, proof = found.module, Proof()
    for training in place.modes:
        block.train(training)
        one = _prove_mode(found, cut, weights, training, (None,) * place.nones)
        mode = "training" if training else "evaluation"
        proof.figures |= {f"{name}, {mode}": report for name, report in one.figures.items()}
        if one.reason is not None:
            return Proof(f"in {mode} mode {one.reason}", proof.figures)
    return proof


def _prove_mode(found: Found, cut: Experts, weights: ExpertWeights, training: bool, rest: tuple[None, ...]) -> Proof:
    block = found.module
    like, hidden, inner = sizes_of(subset(weights, [0]), cut.formula.spec)
    x = _related_tokens(hidden, count_of(inner), like)
    grad = normal(x.shape, x, 1)
    names = _trainable_names(found, cut, (x, *rest)) if training else []

    def run(compute: Callable[..., Any], quick: bool) -> tuple[list[Any], Results, Tensor]:
        wanted = [] if quick else names
        leaves = [block.get_parameter(n).detach().clone().requires_grad_() for n in wanted]
        leaf = x.clone().requires_grad_(training and not quick)
        with same_random(), frozen(block), replaced([(*_owner(block, n), p) for n, p in zip(wanted, leaves, strict=True)]):
            returned = tree_leaves(compute(leaf.clone()))  # a copy, since blocks with jitter write into their input
            random = torch.get_rng_state()
        out = next(t for t in returned if isinstance(t, Tensor) and t.is_floating_point() and t.numel() == x.numel())
        result: Results = {"output": out}
        if training and not quick:
            first, *grads = gradients(out, [leaf, *leaves], grad.reshape(out.shape))
            result["gradient of hidden_states"] = torch.zeros_like(leaf) if first is None else first
            result |= _by_kind(found, names, leaves, grads)
        return [t for t in returned if t is not out], result, random

    def exact(*args: Any) -> Tensor:
        a, index, w, some, spec = args
        return reference.grouped_experts(a.double(), index, w.double(), some, spec).to(a.dtype)

    def through(compute: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
        def call(leaf: Tensor) -> Any:
            out = cut.run(block, (leaf, *rest), {}, compute)
            if isinstance(out, Refusal):
                raise RuntimeError(out.reason)
            return out

        return call

    terms = hidden + inner
    for quick in (True, False):
        old_rest, old, old_random = run(lambda leaf: type(block).forward(block, leaf, *rest), quick)
        new_rest, new, new_random = run(through(functional.grouped_experts), quick)
        if not torch.equal(old_random, new_random):
            return Proof("its formula is another than the one detected: its own code draws other random numbers")
        if not _same(old_rest, new_rest):
            return Proof("its formula is another than the one detected: its own code returns other values beside the hidden states")
        plain, truth = run(through(reference.grouped_experts), quick)[1], run(through(exact), quick)[1]
        outside = [n for n in truth if n.removeprefix("gradient of ") in {n for n in names if not _is_of(found, n)}]
        exact_results = _together(truth, outside, truth, torch.float64)
        old, new, plain = (_together(results, outside, truth) for results in (old, new, plain))
        proof = judge(old, new, plain, exact_results, terms)
        if proof.reason is not None or not training:
            return proof
    return proof


def _together(results: Results, names: Sequence[str], truth: Results, dtype: torch.dtype | None = None) -> Results:
    """Gradients of parameters outside the experts, and that of hidden_states, as one quantity: the tokens being alike, a router's has few
    independent numbers, and its error is a matter of chance. Each counts by its size; one that is smaller than that of hidden_states may
    be nothing but rounding, as where softmax ignores what all its inputs have in common, and counts by the size of that.
    """
    rest: Results = {n: t if t is None or dtype is None else t.to(dtype) for n, t in results.items() if n not in names}
    if not names:
        return rest
    anchor = "gradient of hidden_states"
    sizes = {n: float(truth[n].double().norm()) for n in (anchor, *names)}  # type: ignore[union-attr]
    scaled = [results[n].to(dtype or truth[n].dtype) / (max(sizes[n], sizes[anchor]) or 1.0) for n in sizes]  # type: ignore[union-attr]
    return rest | {f"{anchor} and of what routes them": torch.cat([t.flatten() for t in scaled])}


def _is_of(found: Found, name: str) -> bool:
    return name.startswith(f"{found.container}.")


def _same(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in zip(old, new, strict=True)
    )


def _related_tokens(hidden: int, tokens: int, like: Tensor) -> Tensor:
    """hidden_states `[2,T/2,H]`. The tokens of a row are alike, so that the router sends them to few experts."""
    return normal((2, 1, hidden), like, 0) + 0.25 * normal((2, tokens // 2, hidden), like, 1)


def _by_kind(found: Found, names: Sequence[str], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Results:
    """Gradients by the name of the parameter without its expert: together they are judged, since one expert has few tokens."""
    parts: dict[str, list[Tensor]] = {}
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        kind = name.split(".", 2)[2] if _is_of(found, name) else name
        parts.setdefault(kind, []).append((torch.zeros_like(leaf) if grad is None else grad).flatten())
    return {f"gradient of {kind}": torch.cat(found) for kind, found in parts.items()}


def _trainable_names(found: Found, cut: Experts, args: tuple[Any, ...]) -> list[str]:
    """Parameters whose gradients are proven, where they need gradients: those of the experts with the most tokens, and all others."""
    block = found.module
    routed: list[Tensor] = []

    def watch(a: Tensor, index: Tensor, *_: Any) -> Tensor:
        routed.append(index)
        return torch.zeros_like(a)

    with torch.no_grad(), same_random(), frozen(block):
        cut.run(block, (args[0].clone(), *args[1:]), {}, watch)
    experts = list(block._modules[found.container]._modules)  # type: ignore[union-attr]
    ids = routed[0].flatten()
    counts = torch.bincount(ids[(ids >= 0) & (ids < len(experts))], minlength=len(experts))
    busiest = {experts[e] for e in counts.argsort(descending=True, stable=True)[:ACTIVE_EXPERTS].tolist()}
    return [n for n, p in block.named_parameters() if p.requires_grad and (not _is_of(found, n) or n.split(".")[1] in busiest)]


def _owner(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return block.get_submodule(path), last

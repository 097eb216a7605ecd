"""Proof of blocks that route inline and loop over their experts: the whole block, with its loop replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional, reference
from ..experts import ExpertWeights
from ..integrations.find.candidates import LoopSite
from ..integrations.find.modules import RoutedExperts
from ..integrations.run.patch import LoopReplacement
from ..integrations.sandbox import frozen, replaced, same_random
from ..integrations.usable import Refused
from .rule import ACTIVE_EXPERTS, Proof, Results, Runs, count_of, enlarged, gradients, judge_draws, normal, plain_in, sizes_of, subset


def prove_loop(found: RoutedExperts, replacement: LoopReplacement, site: LoopSite, weights: ExpertWeights, first: bool) -> Proof:
    """A whole block, in each mode that reaches the loop: all it returns, what it writes into itself, the random numbers it draws, and the
    gradients of the input, of its other parameters (router, shared experts) and of the busiest experts.

    first: of the first block of a class, also the output on tokens that the router sends to every expert that it can, and on large ones.
    """
    block = _Block(found, replacement, site, weights)
    proof = Proof()
    for training in site.modes:
        block.standins.train(training)
        more = (block.covering_tokens, lambda draw: enlarged(block.covering_tokens(draw))) if first else ()
        try:
            one = next((p for tokens in more if (p := block.prove(tokens, False)).reason is not None), None)
            one = one or block.prove(block.tokens, training)
        except Refused as refused:
            one = Proof(str(refused))
        mode = "training" if training else "evaluation"
        proof.figures |= {f"{name}, {mode}": report for name, report in one.figures.items()}
        if one.reason is not None:
            return Proof(f"in {mode} mode {one.reason}", proof.figures)
    return proof


class _Block:
    """One block and the ways to run it on the same tokens."""

    def __init__(self, found: RoutedExperts, replacement: LoopReplacement, site: LoopSite, weights: ExpertWeights) -> None:
        self.found, self.replacement, self.block = found, replacement, found.module
        self.standins = frozen(self.block)
        self.rest = (None,) * site.nones
        like, self.hidden, inner = sizes_of(subset(weights, [0]), replacement.formula.spec)
        self.plain = plain_in(weights, replacement.formula.spec)
        self.like = site.values[replacement.routing.hidden_states]
        self.terms = self.hidden + inner
        self.experts = weights.num_experts
        self.count, self.dims = count_of(inner), site.dims

    def tokens(self, draw: int) -> Tensor:
        x = _related_tokens(self.hidden, self.count, self.like, draw)
        return x if self.dims == 3 else x.flatten(0, 1)

    def prove(self, tokens: Callable[[int], Tensor], backward: bool) -> Proof:
        names = self._trainable_names() if backward else []
        return judge_draws(lambda draw: self._runs(tokens(draw), names, backward), self.terms)

    def _runs(self, x: Tensor, names: list[str], backward: bool) -> Runs:
        old_rest, old = self._run(x, names, backward, lambda leaf: type(self.block).forward(self.block, leaf, *self.rest))
        new_rest, new = self._run(x, names, backward, self._through(functional.grouped_experts))
        if not _same(old_rest, new_rest):
            raise Refused(
                "its formula is another than the one detected: beside the hidden states its own code returns, keeps or draws other things"
            )
        plain = self._run(x, names, backward, self._through(self.plain))[1]
        truth = self._run(x, names, backward, self._through(_exact))[1]
        outside = [n for n in truth if n.removeprefix("gradient of ") in {n for n in names if not _is_of(self.found, n)}]
        exact_results = _together(truth, outside, truth, torch.float64)
        old, new, plain = (_together(results, outside, truth) for results in (old, new, plain))
        return Runs(old, new, plain, exact_results)

    def _run(self, x: Tensor, names: Sequence[str], backward: bool, compute: Callable[..., Any]) -> tuple[list[Any], Results]:
        """What the block returns beside its output, writes into its buffers and attributes, and draws; and the results to be judged."""
        leaves = [self.block.get_parameter(n).detach().clone().requires_grad_() for n in names]
        leaf = x.clone().requires_grad_(backward)
        before = _kept(self.block)
        standing_in = [(*_owner(self.block, n), p) for n, p in zip(names, leaves, strict=True)]
        with same_random(), self.standins, replaced(standing_in), torch.set_grad_enabled(backward):
            returned = tree_leaves(compute(leaf.clone()))  # a copy, since blocks with jitter write into their input
            written = [*self.standins.buffers_now(), *(item for item in _kept(self.block) if item not in before), torch.get_rng_state()]
        out = next(t for t in returned if isinstance(t, Tensor) and t.is_floating_point() and t.numel() == x.numel())
        result: Results = {"output": out}
        if backward:
            first, *grads = gradients(out, [leaf, *leaves], normal(x.shape, x, 1).reshape(out.shape))
            result["gradient of hidden_states"] = torch.zeros_like(leaf) if first is None else first
            result |= _by_kind(self.found, names, leaves, grads)
        return [*(t for t in returned if t is not out), *written], result

    def _through(self, compute: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
        def call(leaf: Tensor) -> Any:
            args = (leaf, *self.rest)
            weights = self.replacement.read(self.block, args, {})
            return self.replacement.run(self.block, weights, args, {}, self.standins.paused(compute))

        return call

    def _routing_of(self, x: Tensor) -> Tensor:
        """top_k_index `[N, K]` of the block on x."""
        seen: list[Tensor] = []

        def watch(a: Tensor, index: Tensor, *_: Any) -> Tensor:
            seen.append(index)
            return torch.zeros_like(a)

        with torch.no_grad(), same_random(), self.standins:
            self._through(watch)(x.clone())
        return seen[0]

    def covering_tokens(self, draw: int) -> Tensor:
        """The usual tokens and, for every expert that is chosen by any of many others, one that chooses it."""
        many = normal((1, 16 * self.experts, self.hidden), self.like, 3, draw)
        index = self._routing_of(many if self.dims == 3 else many[0])
        rows = {int((index == e).any(dim=1).int().argmax()) * many.shape[1] // len(index) for e in index.unique().tolist()}
        usual = self.tokens(draw).reshape(1, -1, self.hidden)
        x = torch.cat((usual[:, : len(rows)], many[:, sorted(rows)]), dim=1)
        return x if self.dims == 3 else x[0]

    def _trainable_names(self) -> list[str]:
        """Parameters whose gradients are proven, where they need gradients: of the experts with the most tokens, and all others."""
        experts = list(self.found.experts()._modules)
        ids = self._routing_of(self.tokens(0)).flatten()
        counts = torch.bincount(ids[(ids >= 0) & (ids < len(experts))], minlength=len(experts))
        busiest = {experts[e] for e in counts.argsort(descending=True, stable=True)[:ACTIVE_EXPERTS].tolist()}
        named = [n for n, p in self.block.named_parameters() if p.requires_grad]
        return [n for n in named if not _is_of(self.found, n) or n.split(".")[1] in busiest]


def _exact(*args: Any) -> Tensor:
    a, index, w, some, spec = args
    return reference.grouped_experts(a.double(), index, w.double(), some, spec).to(a.dtype)


def _kept(block: nn.Module) -> list[Any]:
    """What the block keeps in attributes of its own: numbers, and of tensors their number and shapes."""
    found: list[Any] = []
    for name, value in vars(block).items():
        if name[0] != "_" and not callable(value):
            leaves = [tuple(t.shape) if isinstance(t, Tensor) else t for t in tree_leaves(value)]
            found.append((name, len(leaves), [t for t in leaves if isinstance(t, (int, float, str, tuple))]))
    return found


def _together(results: Results, names: Sequence[str], truth: Results, dtype: torch.dtype | None = None) -> Results:
    """Gradients of parameters outside the experts, and that of hidden_states, as one quantity: the tokens being alike, a router's has few
    independent numbers, and its error is a matter of chance. Each counts by its size; one that is smaller than that of hidden_states may
    be nothing but rounding, as where softmax ignores what all its inputs have in common, and counts by the size of that.
    """
    rest: Results = {n: t if dtype is None else t.to(dtype) for n, t in results.items() if n not in names}
    if not names:
        return rest
    anchor = "gradient of hidden_states"
    sizes = {n: float(truth[n].double().norm()) for n in (anchor, *names)}
    scaled = [results[n].to(dtype or truth[n].dtype) / (max(sizes[n], sizes[anchor]) or 1.0) for n in sizes]
    return rest | {f"{anchor} and of what routes them": torch.cat([t.flatten() for t in scaled])}


def _is_of(found: RoutedExperts, name: str) -> bool:
    return name.startswith(f"{found.container}.")


def _same(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in zip(old, new, strict=True)
    )


def _related_tokens(hidden: int, tokens: int, like: Tensor, draw: int) -> Tensor:
    """hidden_states `[2,T/2,H]`. The tokens of a row are alike, so that the router sends them to few experts."""
    return normal((2, 1, hidden), like, 0, draw) + 0.25 * normal((2, tokens // 2, hidden), like, 1, draw)


def _by_kind(found: RoutedExperts, names: Sequence[str], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Results:
    """Gradients by the name of the parameter without its expert: together they are judged, since one expert has few tokens."""
    parts: dict[str, list[Tensor]] = {}
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        kind = name.split(".", 2)[2] if _is_of(found, name) else name
        parts.setdefault(kind, []).append((torch.zeros_like(leaf) if grad is None else grad).flatten())
    return {f"gradient of {kind}": torch.cat(found) for kind, found in parts.items()}


def _owner(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return block.get_submodule(path), last

"""Proof of experts whose routing is in the arguments of a method, and of grouped linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..experts import ExpertWeights
from ..integrations.find.candidates import Site
from ..integrations.find.modules import RoutedExperts
from ..integrations.run.patch import LinearReplacement, MethodReplacement, offsets
from ..integrations.run.routing import Draw, Routing
from ..integrations.sandbox import frozen, replaced, same_random
from .rule import Proof, Results, Runs, count_of, detached, enlarged, gradients, judge_draws, normal, plain_in, sizes_of, zeros_for_none


def prove_call(found: RoutedExperts, replacement: MethodReplacement, site: Site, weights: ExpertWeights, first: bool) -> Proof:
    """A method that receives the routing: its own result against the formula, on random rows and routing in the form it expects.

    first: of the first module of a class also the output of all experts, and on large hidden states.
    """
    module = found.module
    weights = detached(weights)
    spec = replacement.formula.resolve(module)
    like = site.values[replacement.routing.hidden_states]
    leaves = replacement.routing.differentiable
    cls = type(module)

    def by(
        values: Mapping[str, Any], dtype: torch.dtype, compute: Callable[[Mapping[str, Any]], Tensor], grad: Tensor | None = None
    ) -> Results:
        backward = grad is not None
        cast = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and dtype != like.dtype else t for n, t in values.items()}
        inputs = {n: cast[n].clone().requires_grad_(backward) for n in leaves}
        with torch.set_grad_enabled(backward):
            given = {**cast, **inputs}
            out = compute({**given, **replacement.routing.spread(given, weights.num_experts)})
        if grad is None:
            return {"output": out}
        return {"output": out} | zeros_for_none(leaves, list(inputs.values()), gradients(out, list(inputs.values()), grad))

    in_plain = plain_in(weights, spec)

    def formula(v: Mapping[str, Any]) -> Tensor:
        exact = v[replacement.routing.hidden_states].dtype == torch.float64 and like.dtype != torch.float64
        return replacement.compute(module, weights, reference.grouped_experts if exact else in_plain, v)

    def own(v: Mapping[str, Any]) -> Tensor:
        with same_random(), standins:
            before = [None if b is None else b.clone() for b in standins.buffers_now()]
            out = getattr(cls, replacement.attribute)(module, **{n: t.clone() if isinstance(t, Tensor) else t for n, t in v.items()})
            for was, now in zip(before, standins.buffers_now(), strict=True):
                if was is None or now is None or not torch.equal(was, now):
                    raise RuntimeError("its own code writes into a buffer")
        if torch.is_grad_enabled() and not out.requires_grad:
            replacement.without_gradient = True
        return out

    terms = like.shape[-1] + sizes_of(weights, spec)[2]
    proof = Proof()
    standins = frozen(module)
    for mode in site.modes:
        standins.train(mode)

        def forward(large: bool, draw: int) -> Runs:
            values, _ = _routed(replacement.routing, site.values, weights.num_experts, True, draw)
            if large:
                values |= {replacement.routing.hidden_states: enlarged(values[replacement.routing.hidden_states])}
            old = by(values, like.dtype, own)
            return Runs(old, {}, by(values, like.dtype, formula), by(values, torch.float64, formula))

        def both(draw: int) -> Runs:
            values, grad = _routed(replacement.routing, site.values, weights.num_experts, False, draw)
            old = by(values, like.dtype, own, grad)
            with standins:
                ours = standins.paused(functional.grouped_experts)
                new = by(values, like.dtype, lambda v: replacement.compute(module, weights, ours, v), grad)
                return Runs(old, new, by(values, like.dtype, formula, grad), by(values, torch.float64, formula, grad))

        for large in (False, True) if first else ():
            quick = judge_draws(partial(forward, large), terms)
            if quick.reason is not None:
                return quick
        one = judge_draws(both, terms)
        proof = Proof(one.reason, proof.figures | one.figures)
        if proof.reason is not None:
            return proof
    return proof


def _routed(routing: Routing, template: Mapping[str, Any], experts: int, every: bool, draw: int) -> tuple[dict[str, Any], Tensor]:
    """`template` with random hidden states and a random routing to few experts, or every, in it, and a gradient for the result."""
    like = template[routing.hidden_states]
    x, grad = (normal(like.shape, like, seed, draw) for seed in (0, 1))
    rows, top_k = x.numel() // x.shape[-1], routing.top_k(template)
    used = (*(range(experts) if every else sorted({0, experts // 2, experts - 1})), *([experts] if routing.beyond else []))
    generator = torch.Generator("cpu").manual_seed(3 + 10 * draw)
    order = torch.rand(rows, max(top_k, len(used)), generator=generator).argsort(dim=1)[:, :top_k] % len(used)
    index = torch.tensor(used)[order].to(like.device)
    values = {**template, routing.hidden_states: x}
    return values | routing.write(values, Draw(index, used, experts, generator)), grad


def prove_linear(module: nn.Module, replacement: LinearReplacement) -> Proof:
    """A grouped linear layer, called with a list of counts or a tensor, whichever it takes."""
    weight = module.get_parameter(replacement.weight)
    experts, width = weight.shape[0], weight.shape[1 if replacement.transposed else 2]
    rows = count_of(weight.shape[1])
    used = sorted({0, experts // 2, experts - 1})
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[used] = torch.tensor([rows // len(used)] * (len(used) - 1) + [rows - rows // len(used) * (len(used) - 1)])

    def formula(a: Tensor, w: Tensor) -> Tensor:
        parts = a.split(counts.tolist())
        return torch.cat([part @ (w[e] if replacement.transposed else w[e].T) for e, part in enumerate(parts)])

    def by(draw: int, dtype: torch.dtype, compute: Callable[..., Tensor]) -> Results:
        x, grad = normal((rows, width), weight, 0, draw), normal((rows, weight.numel() // experts // width), weight, 1, draw)
        inputs = [x.to(dtype).clone().requires_grad_(), weight.detach().to(dtype).requires_grad_(weight.requires_grad)]
        out = compute(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        return {"output": out} | zeros_for_none(["input", "weight"][: len(wanted)], wanted, gradients(out, wanted, grad))

    def own(a: Tensor, w: Tensor) -> Tensor:
        with frozen(module), replaced([(module, replacement.weight, w)]):
            try:
                return type(module).forward(module, a, counts.tolist())
            except (TypeError, AttributeError):  # it wants a tensor
                return type(module).forward(module, a, counts.to(a.device))

    def ours(a: Tensor, w: Tensor) -> Tensor:
        return functional.ops.grouped_mm(a, w, offsets(counts, a), transposed=replacement.transposed)

    def runs(draw: int) -> Runs:
        old, new, plain = (by(draw, weight.dtype, compute) for compute in (own, ours, formula))
        return Runs(old, new, plain, by(draw, torch.float64, formula))

    return judge_draws(runs, terms=width)

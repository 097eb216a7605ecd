"""Proof of experts whose routing is in the arguments of a method, and of grouped linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from .rule import Proof, Results, count_of, detached, enlarged, gradients, judge, normal, plain_in, sizes_of, zeros_for_none


def prove_call(found: RoutedExperts, replacement: MethodReplacement, site: Site, weights: ExpertWeights, first: bool) -> Proof:
    """A method that receives the routing: its own result against the formula, on random rows and routing in the form it expects.

    first: of the first module of a class also the output of all experts, and on large hidden states.
    """
    module = found.module
    weights = detached(weights)
    spec = replacement.formula.resolve(module)
    like = site.values[replacement.routing.hidden_states]
    few, grad = _routed(replacement.routing, site.values, weights.num_experts, every=False)
    every = _routed(replacement.routing, site.values, weights.num_experts, every=True)[0] if first else few
    leaves = replacement.routing.differentiable
    cls = type(module)

    def by(values: Mapping[str, Any], dtype: torch.dtype, compute: Callable[[Mapping[str, Any]], Tensor], backward: bool) -> Results:
        cast = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and dtype != like.dtype else t for n, t in values.items()}
        inputs = {n: cast[n].clone().requires_grad_(backward) for n in leaves}
        with torch.set_grad_enabled(backward):
            given = {**cast, **inputs}
            out = compute({**given, **replacement.routing.spread(given, weights.num_experts)})
        if not backward:
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
        large = every | {replacement.routing.hidden_states: enlarged(every[replacement.routing.hidden_states])}
        for values in (every, large) if first else ():
            quick = judge(
                by(values, like.dtype, own, False),
                {},
                by(values, like.dtype, formula, False),
                by(values, torch.float64, formula, False),
                terms,
            )
            if quick.reason is not None:
                return quick
        old = by(few, like.dtype, own, True)
        with standins:
            new = by(few, like.dtype, lambda v: replacement.compute(module, weights, functional.grouped_experts, v), True)
            one = judge(old, new, by(few, like.dtype, formula, True), by(few, torch.float64, formula, True), terms)
        proof = Proof(one.reason, proof.figures | one.figures)
        if proof.reason is not None:
            return proof
    return proof


def _routed(routing: Routing, template: Mapping[str, Any], experts: int, every: bool) -> tuple[dict[str, Any], Tensor]:
    """`template` with random hidden states and a random routing to few experts, or every, in it, and a gradient for the result."""
    like = template[routing.hidden_states]
    x, grad = normal(like.shape, like, 0), normal(like.shape, like, 1)
    rows, top_k = x.numel() // x.shape[-1], routing.top_k(template)
    used = (*(range(experts) if every else sorted({0, experts // 2, experts - 1})), *([experts] if routing.beyond else []))
    generator = torch.Generator("cpu").manual_seed(3)
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
    x, grad = normal((rows, width), weight, 0), normal((rows, weight.numel() // experts // width), weight, 1)

    def formula(a: Tensor, w: Tensor) -> Tensor:
        parts = a.split(counts.tolist())
        return torch.cat([part @ (w[e] if replacement.transposed else w[e].T) for e, part in enumerate(parts)])

    def by(dtype: torch.dtype, compute: Callable[..., Tensor]) -> Results:
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

    return judge(by(weight.dtype, own), by(weight.dtype, ours), by(weight.dtype, formula), by(torch.float64, formula), terms=width)

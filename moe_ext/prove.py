"""Proof that a set of experts computes what `moe_ext` will compute in its place, before anything is replaced.

On a few random tokens, forward and backward, in the block's own dtype: truth is the formula in float64, plain the formula in
PyTorch (`moe_ext.reference`), old the block's own code, new ours. A block passes when old obeys the error rule (so the formula is
what the block computes) and new obeys it. Nothing of it remains: not in the random state, buffers, gradients or flags, and no hook
of the block is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import functional, reference
from .experts import ExpertSpec, ExpertWeights, Projection
from .integrations import search, stacked
from .integrations.detect import Found, grouped_linears
from .integrations.parameters import is_meta
from .integrations.patch import Cut, Experts, Linear, Refusal, offsets
from .integrations.quiet import frozen, replaced, same_random, undisturbed
from .integrations.routing import Routing
from .testing import ErrorReport, compare

#: Tokens of a proof: at least this many, and more for narrow experts, so that errors are judged over enough numbers to be typical.
TOKENS, NUMBERS = 32, 4096
#: Experts that a proof reads: enough to tell them apart, few enough that a float64 copy of them costs nothing.
ACTIVE_EXPERTS = 3

_Compute = Callable[..., Tensor]
META = "could not be proven: its weights are on the meta device"


@dataclass
class Proof:
    """`reason` is None for a proof that holds; `figures` are the errors of the new path by quantity."""

    reason: str | None = None
    figures: dict[str, ErrorReport] = field(default_factory=dict)


_Results = dict[str, Tensor | None]


def attempt(proof: Callable[..., Proof], *args: Any) -> Proof:
    """Runs a proof; what it raises becomes its reason, except for running out of memory, which is not about the block."""
    try:
        return proof(*args)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return Proof(f"could not be proven: {type(error).__name__}: {error}")


def _judge(old: _Results, new: _Results, plain: _Results, truth: _Results, terms: int) -> Proof:
    """Applies the error rule to every quantity that the truth has; `terms` is the length of the sums behind them.

    The model's own code is plain PyTorch as well: of its error and that of the formula the larger is what new is measured by.
    """
    proof = Proof()
    for name, exact in truth.items():
        expected = plain[name]
        assert exact is not None and expected is not None
        if not bool(torch.isfinite(exact).all()):
            return Proof(f"could not be proven: its {name} is not finite; are the weights initialised?")
        own = 0.0
        if name in old:
            report = _measure(old[name], expected, exact, terms)
            if not report.ok:
                return Proof(f"its formula is another than the one detected: {name} of its own code has {report}")
            own = report.new
        if name not in new:
            continue
        report = _measure(new[name], expected, exact, terms)
        report = ErrorReport(report.new, max(report.plain, own))
        proof.figures[name] = report
        if not report.ok:
            return Proof(f"moe_ext's {name} has {report}", proof.figures)
    return proof


def _measure(value: Tensor | None, plain: Tensor, truth: Tensor, terms: int) -> ErrorReport:
    value = torch.zeros_like(plain) if value is None else value.to(plain.dtype)  # no gradient is a zero one
    if value.shape != plain.shape:
        return ErrorReport(float("inf"), 0.0)
    report = compare(value, plain, truth)
    if plain.dtype != torch.float64:
        return report
    # In float64 the truth is rounded as much as what it judges: the yardstick is the bound of a sum of so many terms.
    return ErrorReport(report.new, max(report.plain, terms * torch.finfo(torch.float64).eps))


def _gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    if not out.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True))


def _zeros_for_none(names: Sequence[str], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> _Results:
    """Gradients by name; of a truth, an absent one is a zero one."""
    return {f"gradient of {n}": torch.zeros_like(t) if g is None else g for n, t, g in zip(names, tensors, grads, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------- the weights
def _prove_weights(weights: ExpertWeights, spec: ExpertSpec, trainable: bool) -> Proof:
    """New against the formula alone, on a copy of the active experts: output and all gradients. Through the whole of the weights they
    would cost its size, and the model's own loop's quadratically in the number of experts.
    """
    count = weights.num_experts
    experts = sorted({0, count // 2, count - 1})[:ACTIVE_EXPERTS]
    some = _subset(weights, experts)
    like, hidden, inner = _sizes(some, spec)
    x, index, w, grad = _tokens(_count(inner), hidden, len(experts), like)
    smooth = _away_from_kinks(x, some, spec)
    x, index, w, grad = (t[smooth] for t in (x, index, w, grad))

    def by(dtype: torch.dtype, compute: _Compute) -> _Results:
        leaf, leaves = _leaves(some, dtype, trainable)
        inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
        out = compute(inputs[0], index, inputs[1], leaf, spec)
        grads = _gradients(out, [*inputs, *(t for _, t in leaves)], grad)
        result: _Results = {"output": out} | _zeros_for_none(["hidden_states", "top_k_weights"], inputs, grads[:2])
        by_name: dict[str, list[Tensor]] = {}
        for (name, t), g in zip(leaves, grads[2:], strict=True):  # per projection: one expert has too few tokens
            by_name.setdefault(name, []).append((torch.zeros_like(t) if g is None else g).flatten())
        return result | {f"gradient of {name}": torch.cat(found) for name, found in by_name.items()}

    plain, truth = by(like.dtype, reference.grouped_experts), by(torch.float64, reference.grouped_experts)
    return _judge({}, by(like.dtype, functional.grouped_experts), plain, truth, terms=hidden + inner)


def _subset(weights: ExpertWeights, experts: list[int]) -> ExpertWeights:
    def pick(value: Any) -> Any:
        if value is None or isinstance(value, Tensor):
            return None if value is None else value[experts].detach()
        return [value[e].detach() for e in experts]  # of a projection: the matrices it multiplies with

    if isinstance(weights.gate_up_proj, Projection):
        raise TypeError("stacked projections cannot be proven by themselves")
    return ExpertWeights(**{name: pick(value) for name, value in vars(weights).items()})


def _leaves(weights: ExpertWeights, dtype: torch.dtype, trainable: bool) -> tuple[ExpertWeights, list[tuple[str, Tensor]]]:
    leaves: list[tuple[str, Tensor]] = []

    def leaf(name: str, t: Tensor) -> Tensor:
        t = t.to(dtype).clone().requires_grad_(trainable)
        leaves.extend([(name, t)] if trainable else [])
        return t

    copied = {
        name: None if value is None else leaf(name, value) if isinstance(value, Tensor) else [leaf(name, t) for t in value]
        for name, value in vars(weights).items()
    }
    return ExpertWeights(**copied), leaves


def _sizes(weights: ExpertWeights, spec: ExpertSpec) -> tuple[Tensor, int, int]:
    """A tensor with the dtype and device to prove in, H, and I (2I for gate and up together)."""
    if isinstance(weights.gate_up_proj, Tensor):
        _, out, width = weights.gate_up_proj.mT.shape if spec.transposed else weights.gate_up_proj.shape
        return weights.gate_up_proj, width, out
    up = weights.expert(0, spec)["up"]
    assert up is not None
    return up.detach(), up.shape[1], up.shape[0]


# -------------------------------------------------------------------------------------------------------------- decorated experts
def prove_decorated(module: nn.Module, plan: stacked.StackedPlan) -> Proof:
    """Old is the loop that the class was written with."""
    assert plan.formula is not None
    with undisturbed(module):
        weights = stacked.read_weights(module)
        trainable = any(t.requires_grad for t in weights.tensors())
        if is_meta(weights):
            return Proof(META)
        spec = plan.formula.resolve(module)
        weights = _detached(weights)
        like, hidden, inner = _sizes(weights, spec)
        experts = sorted({0, weights.num_experts // 2, weights.num_experts - 1})[:ACTIVE_EXPERTS]
        x, index, w, grad = _tokens(_count(inner), hidden, len(experts), like)
        some = _subset(weights, experts)
        smooth = _away_from_kinks(x, some, spec)
        x, index, w, grad = (t[smooth] for t in (x, index, w, grad))
        everywhere = torch.tensor(experts, device=like.device)[index]

        def by(dtype: torch.dtype, compute: Callable[..., Tensor]) -> _Results:
            inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
            out = compute(*inputs)
            return {"output": out} | _zeros_for_none(["hidden_states", "top_k_weights"], inputs, _gradients(out, inputs, grad))

        def formula(a: Tensor, b: Tensor) -> Tensor:
            return reference.grouped_experts(a, index, b, some, spec)

        with frozen(module):
            old = by(like.dtype, lambda a, b: stacked.run_implementation(module, None, a, everywhere, b))
        new = by(like.dtype, lambda a, b: functional.grouped_experts(a, everywhere, b, weights, spec))
        proof = _judge(old, new, by(like.dtype, formula), by(torch.float64, formula), terms=hidden + inner)
        if proof.reason is not None or not trainable:
            return proof
        more = _prove_weights(weights, spec, trainable)
        return Proof(more.reason, proof.figures | more.figures)


def _detached(weights: ExpertWeights) -> ExpertWeights:
    def detach(value: Any) -> Any:
        if value is None or isinstance(value, Projection):
            return value
        return value.detach() if isinstance(value, Tensor) else [t.detach() for t in value]

    return ExpertWeights(**{name: detach(value) for name, value in vars(weights).items()})


def _count(inner: int) -> int:
    return max(TOKENS, NUMBERS // max(1, inner))


def _normal(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)


def _tokens(tokens: int, hidden: int, experts: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states `[T,H]`, top_k_index and top_k_weights `[T,K]`, and a gradient `[T,H]`; a token's experts are distinct."""
    generator = torch.Generator("cpu").manual_seed(2)
    order = torch.rand(tokens, experts, generator=generator, dtype=torch.float64, device="cpu").argsort(dim=1)
    top_k = min(2, experts)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)
    return _normal((tokens, hidden), like, 0), order[:, :top_k].to(like.device), weights, _normal((tokens, hidden), like, 1)


def _away_from_kinks(x: Tensor, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    """The tokens `[T]` whose pre-activations keep off the places where the activation's derivative jumps: clamps, and zero for relu.

    There the derivative is whatever the rounding makes it, in every implementation. All tokens, where none keeps off.
    """
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if spec.gate_fn is not None or (spec.limit is None and spec.activation != "relu"):
        return kept
    for e in range(weights.num_experts):
        part = {name: None if t is None else t.double() for name, t in weights.expert(e, spec).items()}
        for name in ("gate", "up"):
            if (weight := part[name]) is None:
                continue
            value = F.linear(x.double(), weight, part[f"{name}_bias"])
            # Two roundings of the value, as by a product and a bias that is added to it, and as much again.
            near = 2 * torch.finfo(x.dtype).eps * value.abs().clamp(min=1.0)
            kinks = [0.0] if spec.activation == "relu" else []
            kinks += [] if spec.limit is None else [spec.limit] if name == "gate" else [spec.limit, -spec.limit]
            for kink in kinks:
                kept &= ((value - kink).abs() > near).all(dim=1)
    return kept if bool(kept.any()) else ~kept


# --------------------------------------------------------------------------------------------------------- experts without decorator
def search_and_prove(found: Found, hint: list[Cut] | None) -> tuple[list[Cut], Proof]:
    """The cuts that are proven for `found`, one for each way that training and evaluation take; the proof says why there is none.

    hint: what was proven for another module of the same class is tried first.
    """
    assert found.owner is not None or found.kind == "linear"
    if any(p.is_meta for p in found.module.parameters()):
        return [], Proof(META)
    with undisturbed(found.owner or found.module):
        if found.kind == "linear":
            return _prove_linears(found)
        try:
            places = search.places(found, TOKENS)
            cuts: list[Cut] = []
            whole = Proof()
            for place in places:
                known = [search.adapted(cut) for cut in hint or [] if cut.attribute == place.attribute]
                one, proof = _first(_chain(known, found, place), lambda cut, place=place: _prove_place(found, cut, place))  # type: ignore[misc]
                whole.figures |= proof.figures
                if proof.reason is not None:
                    return [], Proof(proof.reason, whole.figures)
                cuts += one
            return cuts, whole
        except search.NotFound as error:
            return [], Proof(str(error))


def _chain(known: list[Cut], found: Found, place: search.Place) -> Iterator[Cut]:
    yield from known
    yield from search.candidates(found, place)


def _first(candidates: Iterator[Any], prove: Callable[[Any], Proof]) -> tuple[list[Cut], Proof]:
    """The first candidate whose proof holds; else the first reason, which is that of the likeliest candidate."""
    reason: Proof | None = None
    for cut in candidates:
        proof = attempt(prove, cut)
        if proof.reason is None:
            return [cut], proof
        reason = reason or proof
    return [], reason or Proof("no layout and no routing that could be proven fits its shapes")


def _prove_place(found: Found, cut: Experts, place: search.Place) -> Proof:
    weights = cut.reader.read(found.module)
    if isinstance(weights, str):
        return Proof(weights)
    proof = _prove_call(found.module, cut, place, weights) if cut.loop is None else _prove_loop(found, cut, place, weights)
    if proof.reason is not None:
        return proof
    trainable = any(t.requires_grad for t in weights.tensors()) and weights.fusable
    if not weights.fusable and weights.stacked:
        return proof
    more = _prove_weights(_detached(weights), cut.formula.resolve(found.module), trainable)
    return Proof(more.reason, proof.figures | more.figures)


def _prove_call(module: nn.Module, cut: Experts, place: search.Place, weights: ExpertWeights) -> Proof:
    """A method that receives the routing: its own result against the formula, on random rows and routing in the form it expects."""
    weights = _detached(weights)
    spec = cut.formula.resolve(module)
    like = place.values[cut.routing.hidden_states]
    values, grad = _routed(cut.routing, place.values, weights.num_experts)
    if cut.routing.form == "dense":  # the model scatters the weights of the chosen: only those have a gradient
        assert cut.routing.index is not None and cut.routing.weights is not None
        index = values[cut.routing.index]
        values[cut.routing.weights] = values[cut.routing.weights].gather(-1, index)
    leaves = [n for n in (cut.routing.hidden_states, cut.routing.weights) if n is not None]
    cls = type(module)

    def by(dtype: torch.dtype, compute: Callable[[Mapping[str, Any]], Tensor], backward: bool) -> _Results:
        cast = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and dtype != like.dtype else t for n, t in values.items()}
        inputs = {n: cast[n].clone().requires_grad_(backward) for n in leaves}
        with torch.set_grad_enabled(backward):
            out = compute({**cast, **inputs, **_dense(cut.routing, cast, inputs, weights.num_experts)})
        if not backward:
            return {"output": out}
        return {"output": out} | _zeros_for_none(leaves, list(inputs.values()), _gradients(out, list(inputs.values()), grad))

    def formula(v: Mapping[str, Any]) -> Tensor:
        return cut.compute(module, weights, reference.grouped_experts, v)

    def own(v: Mapping[str, Any]) -> Tensor:
        with same_random():
            return getattr(cls, cut.attribute)(module, **{n: t.clone() if isinstance(t, Tensor) else t for n, t in v.items()})

    terms = like.shape[-1] + _sizes(weights, spec)[2]
    proof = Proof()
    with frozen(module):
        for mode in place.modes:
            module.train(mode)
            quick = _judge(by(like.dtype, own, False), {}, by(like.dtype, formula, False), by(torch.float64, formula, False), terms)
            if quick.reason is not None:
                return quick
            old = by(like.dtype, own, True)
            new = by(like.dtype, lambda v: cut.compute(module, weights, functional.grouped_experts, v), True)
            one = _judge(old, new, by(like.dtype, formula, True), by(torch.float64, formula, True), terms)
            proof = Proof(one.reason, proof.figures | one.figures)
            if proof.reason is not None:
                return proof
    return proof


def _dense(routing: Routing, values: Mapping[str, Any], inputs: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Scores of the chosen experts `[.., K]` as the dense ones `[.., E]` that the method expects."""
    if routing.form != "dense":
        return {}
    assert routing.index is not None and routing.weights is not None
    index, chosen = values[routing.index], inputs[routing.weights]
    return {routing.weights: chosen.new_zeros(*index.shape[:-1], experts).scatter(-1, index, chosen)}


def _routed(routing: Routing, template: Mapping[str, Any], experts: int) -> tuple[dict[str, Any], Tensor]:
    """`template` with random hidden states and a random routing to few experts in it, and a gradient for the result."""
    like = template[routing.hidden_states]
    x, grad = _normal(like.shape, like, 0), _normal(like.shape, like, 1)
    rows = x.numel() // x.shape[-1]
    used = sorted({0, experts // 2, experts - 1}) + ([experts] if routing.identity else [])
    index_like = None if routing.index is None else template[routing.index]
    top_k = index_like.numel() // rows if index_like is not None and routing.form in ("top_k", "dense") else 1
    generator = torch.Generator("cpu").manual_seed(3)
    order = torch.rand(rows, max(top_k, len(used)), generator=generator).argsort(dim=1)[:, :top_k] % len(used)
    index = torch.tensor(used)[order].to(like.device)
    values = {**template, routing.hidden_states: x}
    weight_like = None if routing.weights is None else template[routing.weights]
    if weight_like is not None:
        w = torch.rand(weight_like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, weight_like.dtype)
        values[routing.weights] = w  # type: ignore[index]
    if routing.form == "pre_weighted":
        each = torch.arange(experts, device=like.device).repeat_interleave(rows // experts)
        some = torch.isin(each, torch.tensor(used, device=like.device)) & (torch.rand(rows, generator=generator) < 0.5).to(like.device)
        values[routing.hidden_states] = (x.reshape(rows, -1) * some[:, None]).reshape(x.shape)
        return values, grad
    assert index_like is not None and routing.index is not None
    if routing.form == "counts":
        counts = torch.bincount(index.flatten(), minlength=experts)[:experts]
        values[routing.index] = counts.to(index_like.dtype)
    elif routing.form == "one_hot":
        hot = F.one_hot(index[:, 0], experts)
        hot[::5] = 0  # dropped
        values[routing.index] = hot.to(index_like.dtype).reshape(index_like.shape)
    else:
        values[routing.index] = index.to(index_like.dtype).reshape(index_like.shape)
    return values, grad


def _prove_linears(found: Found) -> tuple[list[Cut], Proof]:
    cuts: list[Cut] = []
    whole = Proof()
    for name, module in grouped_linears(found.module).items():
        one, proof = _first(search.linear_candidates(name, module), lambda cut, module=module: _prove_linear(module, cut))  # type: ignore[misc]
        whole.figures |= {f"{name}: {quantity}": report for quantity, report in proof.figures.items()}
        if proof.reason is not None:
            return [], Proof(f"{name}: {proof.reason}", whole.figures)
        cuts += one
    return cuts, whole


def _prove_linear(module: nn.Module, cut: Linear) -> Proof:
    """A grouped linear layer, called with a list of counts or a tensor, whichever it takes."""
    weight = module._parameters[cut.weight]
    assert weight is not None
    experts, width = weight.shape[0], weight.shape[1 if cut.transposed else 2]
    rows = _count(weight.shape[1])
    used = sorted({0, experts // 2, experts - 1})
    counts = torch.zeros(experts, dtype=torch.int64)
    counts[used] = torch.tensor([rows // len(used)] * (len(used) - 1) + [rows - rows // len(used) * (len(used) - 1)])
    x, grad = _normal((rows, width), weight, 0), _normal((rows, weight.numel() // experts // width), weight, 1)

    def formula(a: Tensor, w: Tensor) -> Tensor:
        parts = a.split(counts.tolist())
        return torch.cat([part @ (w[e] if cut.transposed else w[e].T) for e, part in enumerate(parts)])

    def by(dtype: torch.dtype, compute: Callable[..., Tensor]) -> _Results:
        inputs = [x.to(dtype).clone().requires_grad_(), weight.detach().to(dtype).requires_grad_(weight.requires_grad)]
        out = compute(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        return {"output": out} | _zeros_for_none(["input", "weight"][: len(wanted)], wanted, _gradients(out, wanted, grad))

    def own(a: Tensor, w: Tensor) -> Tensor:
        with replaced([(module, cut.weight, w)]):
            try:
                return type(module).forward(module, a, counts.tolist())
            except TypeError:
                return type(module).forward(module, a, counts.to(a.device))

    def ours(a: Tensor, w: Tensor) -> Tensor:
        return functional.ops.grouped_mm(a, w, offsets(counts, a), transposed=cut.transposed)

    return _judge(by(weight.dtype, own), by(weight.dtype, ours), by(weight.dtype, formula), by(torch.float64, formula), terms=width)


# --------------------------------------------------------------------------------------------------------------------------- loops
def _prove_loop(found: Found, cut: Experts, place: search.Place, weights: ExpertWeights) -> Proof:
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
    like, hidden, inner = _sizes(_subset(weights, [0]), cut.formula.spec)
    x = _related_tokens(hidden, _count(inner), like)
    grad = _normal(x.shape, x, 1)
    names = _trainable_names(found, cut, (x, *rest)) if training else []

    def run(compute: Callable[..., Any], quick: bool) -> tuple[list[Any], _Results, Tensor]:
        wanted = [] if quick else names
        leaves = [block.get_parameter(n).detach().clone().requires_grad_() for n in wanted]
        leaf = x.clone().requires_grad_(training and not quick)
        with same_random(), frozen(block), replaced([(*_owner(block, n), p) for n, p in zip(wanted, leaves, strict=True)]):
            returned = tree_leaves(compute(leaf.clone()))  # a copy, since blocks with jitter write into their input
            random = torch.get_rng_state()
        out = next(t for t in returned if isinstance(t, Tensor) and t.is_floating_point() and t.numel() == x.numel())
        result: _Results = {"output": out}
        if training and not quick:
            first, *grads = _gradients(out, [leaf, *leaves], grad.reshape(out.shape))
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
        proof = _judge(old, new, plain, exact_results, terms)
        if proof.reason is not None or not training:
            return proof
    return proof


def _together(results: _Results, names: Sequence[str], truth: _Results, dtype: torch.dtype | None = None) -> _Results:
    """Gradients of parameters outside the experts, and that of hidden_states, as one quantity: the tokens being alike, a router's has few
    independent numbers, and its error is a matter of chance. Each counts by its size; one that is smaller than that of hidden_states may
    be nothing but rounding, as where softmax ignores what all its inputs have in common, and counts by the size of that.
    """
    rest: _Results = {n: t if t is None or dtype is None else t.to(dtype) for n, t in results.items() if n not in names}
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
    return _normal((2, 1, hidden), like, 0) + 0.25 * _normal((2, tokens // 2, hidden), like, 1)


def _by_kind(found: Found, names: Sequence[str], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> _Results:
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

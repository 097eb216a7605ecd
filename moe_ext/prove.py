"""Proof that a set of experts computes what `moe_ext` will compute in its place, before anything is replaced.

On a few random tokens, forward and backward, in the block's own dtype: truth is the formula in float64, plain the formula in
PyTorch (`moe_ext.reference`), old the block's own code, new ours. A block passes when old obeys the error rule (so the formula is
what the block computes) and new obeys it. Nothing of it remains: not in the random state, buffers, gradients or flags, and no hook
of the block is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, reference
from .experts import ExpertSpec, ExpertWeights
from .integrations import module_list, stacked
from .integrations.detect import undisturbed
from .testing import ErrorReport, compare

#: Tokens of a proof: at least this many, and more for narrow experts, so that errors are judged over enough numbers to be typical.
TOKENS, NUMBERS = 32, 4096
#: Experts that a proof reads: enough to tell them apart, few enough that a float64 copy of them costs nothing.
ACTIVE_EXPERTS = 3


_Compute = Callable[..., Tensor]


@dataclass
class Proof:
    """`reason` is None for a proof that holds; `figures` are the errors of the new path by quantity."""

    reason: str | None = None
    figures: dict[str, ErrorReport] = field(default_factory=dict)


@dataclass
class _Results:
    """The same quantities by name, computed in one way."""

    values: dict[str, Tensor | None] = field(default_factory=dict)

    def add(self, names: Sequence[str], tensors: Sequence[Tensor | None]) -> _Results:
        self.values.update(zip(names, tensors, strict=True))
        return self


def attempt(proof: Callable[..., Proof], *args: Any) -> Proof:
    """Runs a proof; what it raises becomes its reason, except for running out of memory, which is not about the block."""
    try:
        return proof(*args)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return Proof(f"could not be proven: {type(error).__name__}: {error}")


def _judge(old: _Results, new: _Results, plain: _Results, truth: _Results, terms: int) -> Proof:
    """Applies the error rule to every quantity that the truth has; `terms` is the length of the sums behind them."""
    proof = Proof()
    for name, exact in truth.values.items():
        expected = plain.values[name]
        assert exact is not None and expected is not None
        if not bool(torch.isfinite(exact).all()):
            return Proof(f"could not be proven: its {name} is not finite; are the weights initialised?")
        if name in old.values:
            report = _measure(old.values[name], expected, exact, terms)
            if not report.ok:
                return Proof(f"its formula is another than the one detected: {name} of its own code has {report}")
        report = _measure(new.values[name], expected, exact, terms)
        proof.figures[name] = report
        if not report.ok:
            return Proof(f"moe_ext's {name} has {report}", proof.figures)
    return proof


def _measure(value: Tensor | None, plain: Tensor, truth: Tensor, terms: int) -> ErrorReport:
    report = compare(torch.zeros_like(plain) if value is None else value.to(plain.dtype), plain, truth)  # no gradient is a zero one
    if plain.dtype != torch.float64:
        return report
    # In float64 the truth is rounded as much as what it judges: the yardstick is the bound of a sum of so many terms.
    return ErrorReport(report.new, max(report.plain, terms * torch.finfo(torch.float64).eps))


def _gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True))


# ------------------------------------------------------------------------------------------------------------------------ stacked
def prove_stacked(module: nn.Module, plan: stacked.StackedPlan) -> Proof:
    """Old is the loop that the class was written with. Gradients of the weights are proven on a copy of the active experts: through
    the whole stack they would cost its size, and the loop's quadratically in the number of experts.
    """
    assert plan.formula is not None
    with undisturbed(module):
        weights = _detached(stacked.read_weights(module))
        spec = stacked.resolve(module, plan.formula)
        down = weights.down_proj
        assert isinstance(down, Tensor) and weights.gate_up_proj is not None
        if down.is_meta:
            return Proof("could not be proven: its weights are on the meta device")
        experts = sorted({0, down.shape[0] // 2, down.shape[0] - 1})[:ACTIVE_EXPERTS]
        hidden = weights.gate_up_proj.shape[1 if spec.transposed else 2]
        inner = weights.gate_up_proj.shape[2 if spec.transposed else 1]
        x, index, w, grad = _tokens(_count(inner), hidden, len(experts), down)
        some = ExpertWeights(**{name: t[experts] for name, t in vars(weights).items() if t is not None})
        smooth = _away_from_kinks(x, some, spec)
        x, index, w, grad = (t[smooth] for t in (x, index, w, grad))
        names = [name for name, t in vars(some).items() if t is not None]
        trainable = any(t.requires_grad for t in stacked.read_weights(module).tensors())
        everywhere = torch.tensor(experts, device=down.device)[index]

        def by_formula(dtype: torch.dtype, compute: _Compute = reference.grouped_experts) -> _Results:
            leaf = ExpertWeights(**{name: getattr(some, name).to(dtype).clone().requires_grad_(trainable) for name in names})
            inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
            out = compute(inputs[0], index, inputs[1], leaf, spec)
            result = _Results({"output": out})
            wanted = [*inputs, *(leaf.tensors() if trainable else [])]
            called = ["hidden_states", "top_k_weights", *(names if trainable else [])]
            return result.add([f"gradient of {name}" for name in called], _gradients(out, wanted, grad))

        def by_module(compute: _Compute) -> _Results:
            inputs = [t.clone().requires_grad_() for t in (x, w)]
            out = compute(inputs[0], everywhere, inputs[1])
            return _Results({"output": out}).add(["gradient of hidden_states", "gradient of top_k_weights"], _gradients(out, inputs, grad))

        with _frozen(module):
            old = by_module(lambda *args: stacked.run_implementation(module, None, *args))
        new = by_module(lambda *args: functional.grouped_experts(args[0], args[1], args[2], weights, spec))
        plain, truth = by_formula(down.dtype), by_formula(torch.float64)
        if trainable:
            new = _Results(by_formula(down.dtype, functional.grouped_experts).values | new.values)
        return _judge(old, new, plain, truth, terms=hidden + inner)


def _count(inner: int) -> int:
    return max(TOKENS, NUMBERS // max(1, inner))


def _tokens(tokens: int, hidden: int, experts: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states `[T,H]`, top_k_index and top_k_weights `[T,K]`, and a gradient `[T,H]`; a token's experts are distinct."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)

    order = torch.rand(tokens, experts, generator=generator, dtype=torch.float64, device="cpu").argsort(dim=1)
    top_k = min(2, experts)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64, device="cpu")
    return normal(tokens, hidden), order[:, :top_k].to(like.device), weights.to(like.device, like.dtype), normal(tokens, hidden)


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


def _detached(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(**{name: t.detach() for name, t in vars(weights).items() if t is not None})


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """The module's own parameters stand in as detached aliases, so that no graph, hook or gradient of theirs is touched."""
    with _replaced([(module, name, p.detach()) for name, p in module._parameters.items() if p is not None]):
        yield


@contextlib.contextmanager
def _replaced(parameters: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    saved = [(module, name, module._parameters[name]) for module, name, _ in parameters]
    try:
        for module, name, value in parameters:
            module._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in saved:
            module._parameters[name] = parameter


# -------------------------------------------------------------------------------------------------------------------- module list
def returns_logits(block: nn.Module) -> bool:
    """Whether the block returns `(out, router_logits)`, seen by running it on one token; raises TypeError for anything else.

    To be called inside `undisturbed(block)`, like `prove_module_list`.
    """
    weight = next(block.experts.parameters())
    width = getattr(block.gate, "in_features", None) or weight.shape[1]
    with torch.no_grad():
        block.eval()
        out = type(block).forward(block, torch.zeros(1, 1, width, dtype=weight.dtype, device=weight.device))
    if isinstance(out, Tensor):
        return False
    if isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) for t in out):
        return True
    raise TypeError(f"its forward returns {type(out).__name__}, neither a tensor nor (hidden_states, router_logits)")


def prove_module_list(block: nn.Module, forward: module_list.BlockForward) -> Proof:
    """Whole blocks, in training with gradients and in evaluation without: output, router logits, gradients of the input, of
    the router logits and of the busiest experts. Both ways must draw the same random numbers and give the same router logits.
    """
    weights = module_list.read_weights(block, forward.projections)
    assert isinstance(weights, ExpertWeights)
    proof = Proof()
    for training in (True, False):
        block.train(training)
        one = _prove_mode(block, forward, weights, training)
        mode = "training" if training else "evaluation"
        proof.figures |= {f"{name}, {mode}": report for name, report in one.figures.items()}
        if one.reason is not None:
            return Proof(f"in {mode} mode {one.reason}", proof.figures)
    return proof


def _prove_mode(block: nn.Module, forward: module_list.BlockForward, weights: ExpertWeights, training: bool) -> Proof:
    first = weights.tensors()[0]
    dtype, hidden = first.dtype, weights.up_proj[0].shape[1]  # type: ignore[index]
    x, grad = _related_tokens(hidden, first)
    with _same_random():
        index = module_list.route(block, x)[3]
    with _same_random():
        noise = module_list.draw_noise(block, x)
    names = _trainable_names(block, index, forward.projections) if training else []

    def measure(compute: Callable[[Tensor], Any], dtype: torch.dtype, leaves: Sequence[Tensor]) -> _Results:
        leaf = x.to(dtype).clone().requires_grad_(training)
        out = compute(leaf.clone())  # a copy, since blocks with jitter write into their input
        out, logits = out if isinstance(out, tuple) else (out, None)
        result = _Results({"output": out} | ({} if logits is None else {"router logits": logits}))
        if training:
            routed = [] if logits is None else [logits]
            grads = torch.autograd.grad(out, [leaf, *routed, *leaves], grad.to(out.dtype), allow_unused=True)
            result.add(["gradient of hidden_states", "gradient of router logits"][: 1 + len(routed)], grads[: 1 + len(routed)])
            for kind, found in _by_kind(names, leaves, grads[1 + len(routed) :]).items():
                result.add([f"gradient of {kind}"], [torch.cat(found)])
        return result

    def by_block(compute: Callable[[Tensor], Any]) -> tuple[_Results, Tensor]:
        leaves = [p.detach().clone().requires_grad_() for p in _parameters(block, names)]
        frozen = [(m, n, p.detach()) for m in block.modules() for n, p in m._parameters.items() if p is not None]
        with _same_random(), _replaced(frozen), _replaced([(*_owner(block, n), p) for n, p in zip(names, leaves, strict=True)]):
            return measure(compute, dtype, leaves), torch.get_rng_state()

    def by_formula(dtype: torch.dtype) -> _Results:
        leaves = [p.detach().to(dtype).clone().requires_grad_() for p in _parameters(block, names)]
        exact = dtype == torch.float64 and dtype != first.dtype
        gate = {n: p.detach().to(dtype) for n, p in block.gate.named_parameters()}

        def compute(leaf: Tensor) -> Any:
            jittered = (leaf if noise is None else leaf * noise.to(dtype)).reshape(-1, hidden)
            logits = torch.func.functional_call(block.gate, gate, (jittered,))
            w = F.softmax(logits, dim=-1, dtype=torch.float64 if exact else torch.float).gather(-1, index)
            w = w / w.sum(dim=-1, keepdim=True) if getattr(block, "norm_topk_prob", True) else w
            some = _with_leaves(weights, {id(p): leaf for p, leaf in zip(_parameters(block, names), leaves, strict=True)})
            out = reference.grouped_experts(jittered, index, w.to(dtype), some, forward.spec).reshape(leaf.shape)
            return (out, logits) if forward.returns_logits else out

        return measure(compute, dtype, leaves)

    old, old_random = by_block(lambda leaf: type(block).forward(block, leaf))
    new, new_random = by_block(lambda leaf: _run_new(block, leaf, forward))
    if not torch.equal(old_random, new_random):
        return Proof("its formula is another than the one detected: its own code draws other random numbers")
    if forward.returns_logits and not torch.equal(old.values["router logits"], new.values["router logits"]):  # type: ignore[arg-type]
        return Proof("its formula is another than the one detected: its own code returns other router logits")
    return _judge(old, new, by_formula(dtype), by_formula(torch.float64), terms=hidden + first.shape[0])


def _run_new(block: nn.Module, leaf: Tensor, forward: module_list.BlockForward) -> Any:
    weights = module_list.read_weights(block, forward.projections)
    assert isinstance(weights, ExpertWeights)
    return module_list.run(block, leaf, weights, forward.spec, forward.returns_logits)


@contextlib.contextmanager
def _same_random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _related_tokens(hidden: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_states and a gradient, `[2,T/2,H]`. The tokens of a row are alike, so that the router sends them to few experts."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    tokens = _count(like.shape[0])
    x = normal(2, 1, hidden) + 0.25 * normal(2, tokens // 2, hidden)
    return x.to(like.device, like.dtype), normal(*x.shape).to(like.device, like.dtype)


def _by_kind(names: Sequence[str], leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> dict[str, list[Tensor]]:
    """Flat gradients by the name of the parameter without its expert: together they are judged, since one expert has few tokens."""
    found: dict[str, list[Tensor]] = {}
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        kind = name.split(".", 2)[2]
        found.setdefault(kind, []).append((torch.zeros_like(leaf) if grad is None else grad).flatten())
    return found


def _trainable_names(block: nn.Module, index: Tensor, projections: tuple[str, str, str]) -> list[str]:
    """Parameters whose gradients are proven: of the experts with the most tokens, where they need gradients. The gate is not
    replaced: the gradient of its logits is what it gets from us.
    """
    names: list[str] = []
    busiest = torch.bincount(index.flatten(), minlength=len(block.experts)).argsort(descending=True, stable=True)
    for e in busiest[:ACTIVE_EXPERTS].tolist():
        names += [f"experts.{e}.{p}.{kind}" for p in projections for kind in ("weight", "bias")]
    known = dict(block.named_parameters(remove_duplicate=False))
    first = {id(known[name]): name for name in reversed(names) if name in known and known[name].requires_grad}
    return [name for name in names if name in first.values()]


def _owner(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return block.get_submodule(path), last


def _parameters(block: nn.Module, names: Sequence[str]) -> list[Tensor]:
    return [block.get_parameter(name) for name in names]


def _with_leaves(weights: ExpertWeights, leaves: dict[int, Tensor]) -> ExpertWeights:
    """`weights` detached, with a leaf in each place where the tensor of its key, an `id`, is: experts may share theirs."""
    return ExpertWeights(
        **{name: [leaves.get(id(t), t.detach()) for t in tensors] for name, tensors in vars(weights).items() if tensors is not None}
    )

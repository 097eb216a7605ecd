"""The error rule of a proof, and the random tokens and weights that it is applied to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional, reference
from ..experts import ExpertSpec, ExpertWeights, Projection, StackedWeights
from ..integrations.usable import Refused
from ..testing import ErrorReport, compare

#: Tokens of a proof: at least this many, and more for narrow experts, so that errors are judged over enough numbers to be typical.
TOKENS, NUMBERS = 32, 4096
#: A proof of few numbers may miss the rule by chance. It then draws other tokens, at most so many times, and judges all numbers together,
#: unless an error is more than `CLEAR` times the plain one: that is no chance.
DRAWS, CLEAR = 32, 32.0
#: Experts that a proof reads: enough to tell them apart, few enough that a float64 copy of them costs nothing.
ACTIVE_EXPERTS = 3


def enlarged(x: Tensor) -> Tensor:
    """Hidden states so large that clamps of pre-activations and outputs are reached, and float16 is not left."""
    return x * (8 if x.dtype == torch.float16 else 64)


Compute = Callable[..., Tensor]


@dataclass
class Proof:
    """`reason` is None for a proof that holds; `figures` are the errors of the new path by quantity. missed: of a proof that does not
    hold, the errors that missed the rule.
    """

    reason: str | None = None
    figures: dict[str, ErrorReport] = field(default_factory=dict)
    missed: ErrorReport | None = None


Results = dict[str, Tensor]


def attempt(proof: Callable[..., Proof], *args: Any) -> Proof:
    """Runs a proof; what it raises becomes its reason, except for running out of memory, which is not about the block."""
    try:
        return proof(*args)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Refused as refused:
        return Proof(str(refused))
    except Exception as error:
        return Proof(f"could not be proven: {type(error).__name__}: {error}")


@dataclass
class Runs:
    """The results of the model's own code, ours, the formula in PyTorch and in float64, on the same tokens."""

    old: Results
    new: Results
    plain: Results
    truth: Results

    def joined(self, more: Runs) -> Runs:
        """All numbers of both, by quantity."""
        pairs = ((self.old, more.old), (self.new, more.new), (self.plain, more.plain), (self.truth, more.truth))
        return Runs(*({n: torch.cat((a[n].flatten(), b[n].flatten())) for n in a if n in b} for a, b in pairs))


def judge_draws(draw: Callable[[int], Runs], terms: int) -> Proof:
    """`judge` on `draw(0)`; on a miss on more draws, all together, until the rule is obeyed, the miss is clear, or there were `DRAWS`.

    Errors of a right block scatter about those of plain PyTorch, and less the more numbers there are; those of a wrong one grow with them.
    """
    runs = draw(0)
    proof = judge(runs.old, runs.new, runs.plain, runs.truth, terms)
    for i in range(1, DRAWS):
        if proof.missed is None or not proof.missed.ratio <= CLEAR:
            break
        runs = runs.joined(draw(i))
        proof = judge(runs.old, runs.new, runs.plain, runs.truth, terms)
    return proof


def judge(old: Results, new: Results, plain: Results, truth: Results, terms: int) -> Proof:
    """Applies the error rule to every quantity that the truth has; `terms` is the length of the sums behind them.

    The model's own code is plain PyTorch as well: of its error and that of the formula the larger is what new is measured by.
    """
    proof = Proof()
    for name, exact in truth.items():
        expected = plain[name]
        if not bool(torch.isfinite(exact).all()):
            return Proof(f"could not be proven: its {name} is not finite; are the weights initialised?")
        own = 0.0
        if name in old:
            report = _measure(old[name], expected, exact, terms)
            if not report.ok:
                return Proof(f"its formula is another than the one detected: {name} of its own code has {report}", missed=report)
            factor = _factor(old[name], expected, exact)
            if name == "output" and abs(factor - 1) > report.plain:
                reason = f"its formula is another than the one detected: {name} of its own code is {factor:.4f} times that of the formula"
                return Proof(reason, missed=ErrorReport(abs(factor - 1), report.plain))
            own = report.new
        if name not in new:
            continue
        report = _measure(new[name], expected, exact, terms)
        report = ErrorReport(report.new, max(report.plain, own))
        proof.figures[name] = report
        if not report.ok:
            return Proof(f"moe_ext's {name} has {report}", proof.figures, report)
    return proof


def _factor(value: Tensor, plain: Tensor, truth: Tensor) -> float:
    """By what `value` is larger than `plain`, on the whole. Errors of rounding have no direction: beside a factor that hides among them in
    16 bit, as one of 1.01, they vanish when all numbers are taken together.
    """
    value, plain, truth = (t.detach().double().flatten() for t in (value, plain, truth))
    return 1 + float((value - plain) @ truth) / (float(truth @ truth) or 1.0)


def _measure(value: Tensor, plain: Tensor, truth: Tensor, terms: int) -> ErrorReport:
    value = value.to(plain.dtype)
    if value.shape != plain.shape:
        return ErrorReport(float("inf"), 0.0)
    report = compare(value, plain, truth)
    if plain.dtype != torch.float64:
        return report
    # In float64 the truth is rounded as much as what it judges: the yardstick is the bound of a sum of so many terms.
    return ErrorReport(report.new, max(report.plain, terms * torch.finfo(torch.float64).eps))


def gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    if not out.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True))


def zeros_for_none(names: Sequence[str], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Results:
    """Gradients by name; of a truth, an absent one is a zero one."""
    return {f"gradient of {n}": torch.zeros_like(t) if g is None else g for n, t, g in zip(names, tensors, grads, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------- the weights
def plain_in(weights: ExpertWeights, spec: ExpertSpec) -> Compute:
    """The formula in PyTorch in the lower precision of hidden states and weights: those of 4-bit experts are computed in their own."""
    dtype = sizes_of(subset(weights, [0]), spec)[0].dtype

    def compute(x: Tensor, index: Tensor, w: Tensor, some: ExpertWeights, spec: ExpertSpec) -> Tensor:
        lower = min(x.dtype, dtype, key=lambda d: -torch.finfo(d).eps)
        return reference.grouped_experts(x.to(lower), index, w.to(lower), some, spec).to(x.dtype)

    return compute


def prove_weights(weights: ExpertWeights, spec: ExpertSpec, trainable: bool) -> Proof:
    """New against the formula alone, on a copy of the active experts: output and all gradients. Through the whole of the weights they
    would cost its size, and the model's own loop's quadratically in the number of experts.
    """
    count = weights.num_experts
    experts = sorted({0, count // 2, count - 1})[:ACTIVE_EXPERTS]
    some = subset(weights, experts)
    like, hidden, inner = sizes_of(some, spec)

    def by(tokens: Sequence[Tensor], dtype: torch.dtype, compute: Compute) -> Results:
        x, index, w, grad = tokens
        leaf, leaves = _leaves(some, dtype, trainable)
        inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
        out = compute(inputs[0], index, inputs[1], leaf, spec)
        grads = gradients(out, [*inputs, *(t for _, t in leaves)], grad)
        result: Results = {"output": out} | zeros_for_none(["hidden_states", "top_k_weights"], inputs, grads[:2])
        by_name: dict[str, list[Tensor]] = {}
        for (name, t), g in zip(leaves, grads[2:], strict=True):  # per projection: one expert has too few tokens
            by_name.setdefault(name, []).append((torch.zeros_like(t) if g is None else g).flatten())
        return result | {f"gradient of {name}": torch.cat(found) for name, found in by_name.items()}

    def draw(number: int) -> Runs:
        tokens = smooth_tokens(some, spec, count_of(inner), number)
        plain, truth = (by(tokens, dtype, reference.grouped_experts) for dtype in (like.dtype, torch.float64))
        return Runs({}, by(tokens, like.dtype, functional.grouped_experts), plain, truth)

    return judge_draws(draw, terms=hidden + inner)


def smooth_tokens(weights: ExpertWeights, spec: ExpertSpec, count: int, draw: int) -> list[Tensor]:
    """`tokens_of` these experts, `count` that keep away from kinks, or somewhat fewer; any, where none of these wide experts does."""
    like, hidden, _ = sizes_of(weights, spec)
    found: list[list[Tensor]] = []
    for batch in range(_BATCHES):
        tokens = tokens_of(count, hidden, weights.num_experts, like, _BATCHES * draw + batch)
        smooth = away_from_kinks(tokens[0], weights, spec)
        if not batch and not bool(smooth.any()):
            return list(tokens)
        found.append([t[smooth] for t in tokens])
        if sum(len(part[0]) for part in found) >= count:
            break
    return [torch.cat(parts)[:count] for parts in zip(*found, strict=True)]


def subset(weights: ExpertWeights, experts: list[int]) -> ExpertWeights:
    def pick(_: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[experts].detach()
        return [value[e].detach() for e in experts]  # of a projection: the matrices it multiplies with

    if weights.stacked and not weights.fusable:
        raise TypeError("stacked projections cannot be proven by themselves")
    return weights.mapped(pick)


def _leaves(weights: ExpertWeights, dtype: torch.dtype, trainable: bool) -> tuple[ExpertWeights, list[tuple[str, Tensor]]]:
    leaves: list[tuple[str, Tensor]] = []

    def leaf(name: str, t: Tensor) -> Tensor:
        t = t.to(dtype).clone().requires_grad_(trainable)
        leaves.extend([(name, t)] if trainable else [])
        return t

    return weights.mapped(lambda name, v: leaf(name, v) if isinstance(v, Tensor) else [leaf(name, t) for t in v]), leaves


def sizes_of(weights: ExpertWeights, spec: ExpertSpec) -> tuple[Tensor, int, int]:
    """A tensor with the dtype and device to prove in, H, and I (2I for gate and up together)."""
    if isinstance(weights, StackedWeights) and isinstance(weights.gate_up_proj, Tensor):
        _, out, width = weights.gate_up_proj.mT.shape if spec.transposed else weights.gate_up_proj.shape
        return weights.gate_up_proj, width, out
    up = weights.expert(0, spec).up
    return up.detach(), up.shape[1], up.shape[0]


_Weights = TypeVar("_Weights", bound=ExpertWeights)


def detached(weights: _Weights) -> _Weights:
    def detach(_: str, value: Any) -> Any:
        if isinstance(value, Projection):
            return value
        return value.detach() if isinstance(value, Tensor) else [t.detach() for t in value]

    return weights.mapped(detach)


def count_of(inner: int) -> int:
    return max(TOKENS, NUMBERS // max(1, inner))


def normal(shape: Sequence[int], like: Tensor, seed: int, draw: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed + _SEEDS * draw)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)


#: Seeds that one batch of tokens may use, and batches that one draw may use.
_SEEDS, _BATCHES = 10, 16


def tokens_of(tokens: int, hidden: int, experts: int, like: Tensor, draw: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_states `[T,H]`, top_k_index and top_k_weights `[T,K]`, and a gradient `[T,H]`; a token's experts are distinct."""
    generator = torch.Generator("cpu").manual_seed(2 + _SEEDS * draw)
    order = torch.rand(tokens, experts, generator=generator, dtype=torch.float64, device="cpu").argsort(dim=1)
    top_k = min(2, experts)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)
    x, grad = (normal((tokens, hidden), like, seed, draw) for seed in (0, 1))
    return x, order[:, :top_k].to(like.device), weights, grad


def away_from_kinks(x: Tensor, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    """The tokens `[T]` whose pre-activations keep off the places where the activation's derivative jumps: clamps, and zero for relu.

    There the derivative is whatever the rounding makes it, in every implementation.
    """
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if spec.gate_fn is not None or (spec.limit is None and spec.activation != "relu"):
        return kept
    for e in range(weights.num_experts):
        part = weights.expert(e, spec).to(torch.float64)
        for name, weight, bias in (("gate", part.gate, part.gate_bias), ("up", part.up, part.up_bias)):
            if weight is None:
                continue
            value = F.linear(x.double(), weight, bias)
            # Two roundings of the value, as by a product and a bias that is added to it, and as much again.
            near = 2 * torch.finfo(x.dtype).eps * value.abs().clamp(min=1.0)
            kinks = [0.0] if spec.activation == "relu" else []
            kinks += [] if spec.limit is None else [spec.limit] if name == "gate" else [spec.limit, -spec.limit]
            for kink in kinks:
                kept &= ((value - kink).abs() > near).all(dim=1)
    return kept

"""How often a proof refuses a right block, and accepts a wrong one: thousands of proofs on small experts with random weights.

Every formula is proven in bfloat16 and float16, with clamps that are active. The wrong blocks compute something close to the formula.
    python -m benchmarks.proof_verdicts --proofs 20000
The counts are written to benchmarks/results/proof_verdicts.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moe_ext import functional, reference
from moe_ext.experts import ExpertSpec, StackedWeights
from moe_ext.prove.rule import TOKENS, Proof, Results, Runs, gradients, judge_draws, prove_weights, smooth_tokens, zeros_for_none

EXPERTS, HIDDEN, INNER = 4, 32, 24
SPECS = {
    "silu": ExpertSpec(),
    "gelu": ExpertSpec("gelu"),
    "gelu_tanh": ExpertSpec("gelu_tanh"),
    "relu": ExpertSpec("relu"),
    "relu2, no gate": ExpertSpec("relu2", gated=False),
    "silu, clamp": ExpertSpec(limit=0.7),
    "gpt-oss, clamp": ExpertSpec("swigluoai", alpha=1.702, limit=0.7, interleaved=True, transposed=True),
    "MiniMax-M3, clamp": ExpertSpec("swigluoai", alpha=1.702, limit=0.7),
}
Weights = StackedWeights
Block = Callable[[Tensor, Tensor, Tensor, Weights, ExpertSpec], Tensor]


def weights_of(spec: ExpertSpec, dtype: torch.dtype, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * INNER if spec.gated else INNER
    up = torch.randn(EXPERTS, rows, HIDDEN, generator=generator) * 0.2
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * 0.2
    if spec.transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    return StackedWeights(up.to(dtype), down.to(dtype))


def _stacks(weights: Weights) -> tuple[Tensor, Tensor]:
    up, down = weights.gate_up_proj, weights.down_proj
    if not (isinstance(up, Tensor) and isinstance(down, Tensor)):
        raise TypeError("the weights of these proofs are plain tensors")
    return up, down


def right(x: Tensor, index: Tensor, w: Tensor, weights: Weights, spec: ExpertSpec) -> Tensor:
    """What models' own code does: a loop over the experts, rounded at each step, with sums in the order of the experts."""
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        row, slot = torch.where(index == e)
        one = StackedWeights(*(stack[e : e + 1] for stack in _stacks(weights)))
        zero, whole = torch.zeros_like(row)[:, None], torch.ones_like(w[row, slot, None])
        y = reference.grouped_experts(x[row], zero, whole, one, spec)
        out = out.index_add(0, row, y * w[row, slot, None])
    return out


def _other(spec: ExpertSpec, **options: object) -> ExpertSpec:
    return ExpertSpec(**{**spec.__dict__, **options})  # type: ignore[arg-type]


def _exchanged(weights: Weights, spec: ExpertSpec) -> Weights:
    axis = 2 if spec.transposed else 1
    up, _ = _stacks(weights)
    parts = up.unflatten(axis, (-1, 2)).flip(axis + 1) if spec.interleaved else up.unflatten(axis, (2, -1)).flip(axis)
    return StackedWeights(parts.flatten(axis, axis + 1), weights.down_proj)


#: What a wrong block computes, and for which formulas it is another thing than the right one.
WRONG: dict[str, tuple[Block, Callable[[ExpertSpec], bool]]] = {
    "scale 1.01": (lambda x, i, w, t, s: right(x, i, w, t, s) * 1.01, lambda s: True),
    "gate and up exchanged": (lambda x, i, w, t, s: right(x, i, w, _exchanged(t, s), s), lambda s: s.gated),
    "weights applied twice": (lambda x, i, w, t, s: right(x, i, w * w, t, s), lambda s: True),
    "clamp missing": (lambda x, i, w, t, s: right(x, i, w, t, _other(s, limit=None)), lambda s: s.limit is not None),
    "one expert off by one": (lambda x, i, w, t, s: right(x, torch.where(i == 0, 1, i), w, t, s), lambda s: True),
}


def prove(block: Block, spec: ExpertSpec, weights: Weights, seed: int) -> tuple[Proof, int]:
    """The proof of decorated experts (`moe_ext.prove`), with `block` as their own code, on tokens of the seed; and the draws it took."""
    draws = 0

    def by(dtype: torch.dtype, compute: Block, tokens: list[Tensor]) -> Results:
        x, index, w, grad = tokens
        inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
        out = compute(inputs[0], index, inputs[1], weights, spec)
        return {"output": out} | zeros_for_none(["hidden_states", "top_k_weights"], inputs, gradients(out, inputs, grad))

    def draw(number: int) -> Runs:
        nonlocal draws
        draws += 1
        tokens, dtype = smooth_tokens(weights, spec, TOKENS, 1000 * seed + number), _stacks(weights)[1].dtype
        plain, truth = by(dtype, reference.grouped_experts, tokens), by(torch.float64, reference.grouped_experts, tokens)
        return Runs(by(dtype, block, tokens), by(dtype, functional.grouped_experts, tokens), plain, truth)

    return judge_draws(draw, HIDDEN + INNER), draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proofs", type=int, default=20000, help="of right blocks; of wrong ones it is a twentieth for each kind")
    parser.add_argument("--first", type=int, default=0, help="the number of the first proof")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "proof_verdicts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    missed: list[str] = []
    begin = time.perf_counter()
    cases = list(itertools.product(SPECS, (torch.bfloat16, torch.float16)))
    for n in range(arguments.first, arguments.first + arguments.proofs):
        if time.perf_counter() - begin > arguments.seconds:
            break
        (name, dtype), seed = cases[n % len(cases)], n // len(cases)
        spec = SPECS[name]
        weights = weights_of(spec, dtype, seed)
        with torch.enable_grad():
            proof, draws = prove(right, spec, weights, seed)
            counts["right, proven"] += 1
            counts["right, refused"] += proof.reason is not None
            counts["right, refused by one draw alone"] += draws > 1
            counts["right, draws"] += draws
            if n % 8 == 0:
                counts["gradients of weights, proven"] += 1
                counts["gradients of weights, refused"] += prove_weights(weights, spec, True).reason is not None
            if proof.reason is not None:
                missed.append(f"{name}, {dtype}, seed {seed}: {proof.reason}")
            kind = list(WRONG)[seed % len(WRONG)]
            block, differs = WRONG[kind]
            if seed % 4 == 0 and differs(spec):
                counts[f"{kind}, proven"] += 1
                accepted = prove(block, spec, weights, seed)[0]
                counts[f"{kind}, accepted"] += accepted.reason is None
                if accepted.reason is None:
                    missed.append(f"accepted: {kind}, {name}, {dtype}, seed {seed}: {accepted.figures}")
    result = {"counts": dict(sorted(counts.items())), "refused": missed, "seconds": round(time.perf_counter() - begin, 1)}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

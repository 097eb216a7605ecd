"""`enable` a Hugging Face model, `disable` it again, `explain` what would happen.

Everything is detected and proven first and applied only then, so an exception leaves the model as it was. Decorated experts are
switched through the `experts_implementation` of their configs, all others by a method on the instance; both are taken back exactly.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from . import prove as proofs
from .experts import ExpertWeights
from .integrations.find import modules
from .integrations.run import bitsandbytes, decorated, listed, patch
from .integrations.usable import DISABLE_VARIABLE, disabled_by_environment
from .report import BlockReport, EnableError, EnableReport, NoExpertsFound

#: Proofs compare what is drawn from the global random generators, which belong to the whole process.
_ONE_AT_A_TIME = threading.RLock()


@dataclass
class _Candidate:
    """A set of experts on its way into the report, with what `_apply` needs."""

    found: modules.Found
    report: BlockReport
    plan: decorated.StackedPlan | None = None
    cuts: list[patch.Cut] = field(default_factory=list)


def register() -> None:
    """Makes `from_pretrained(..., experts_implementation="moe_ext")` and `set_experts_implementation("moe_ext")` work.

    Needs transformers >= 5, else raises ImportError. `enable` registers by itself, and proves what it enables; experts that are only
    given the name are detected at their first forward and not proven.
    """
    decorated.register()


def enable(
    model: nn.Module,
    strict: bool = False,
    prove: bool = True,
    quantized: Literal["recompute", "cache"] = "recompute",
    recompute: bool = False,
) -> EnableReport:
    """Makes `moe_ext` compute the experts of `model`, in place; returns what was done, block by block.

    prove: first run old and new on a few random tokens, forward and backward; a block that does not agree by the error rule
    (`moe_ext.testing`) is skipped with the figures in its reason. prove=False spares that for experts behind transformers' decorator,
    whose flags say their layout; of all others nothing is known without it.
    quantized: what is done with 4-bit experts: "recompute" dequantizes, at each forward and backward, those that have tokens, into a
    bounded workspace; "cache" keeps dense copies of all that have had tokens, as long as the packed bytes stay what they were.
    recompute: train with less memory, as `ExpertSpec.recompute` says; for the blocks that the report calls fused.
    strict: raise EnableError, which holds the report, when any set of experts would be skipped; the model is then as it was.

    Raises NoExpertsFound, with what was looked at, when no module is a set of experts that moe_ext can compute. With MOE_EXT_DISABLE=1
    in the environment nothing is done, and the report says so. Calling it again examines and proves again.
    """
    with _ONE_AT_A_TIME:
        return _enable(model, strict, prove, quantized, recompute)


def _enable(model: nn.Module, strict: bool, prove: bool, quantized: str, recompute: bool) -> EnableReport:
    if quantized not in ("recompute", "cache"):
        raise ValueError(f"quantized={quantized!r} is neither 'recompute' nor 'cache'")
    begin = time.perf_counter()
    candidates = _examine(model)
    report = EnableReport(type(model).__name__, [c.report for c in candidates])
    if disabled_by_environment():
        report.note = f"{DISABLE_VARIABLE} is set: nothing was enabled"
        for c in candidates:
            c.report.reason = c.report.reason or f"{DISABLE_VARIABLE} is set"
            c.report.path, c.report.enabled = "original", False
        return report
    _require_experts(model, candidates)
    _plan(candidates, prove, quantized, recompute)
    report.note = _note(model, candidates)
    for c in candidates:
        c.report.path = "original" if c.report.reason is not None else c.report.path
    report.seconds = time.perf_counter() - begin
    if strict and report.skipped:
        for c in candidates:
            c.report.enabled = _is_enabled(c.found)
        raise EnableError(report)
    _apply(candidates)
    return report


def disable(model: nn.Module) -> int:
    """Takes back what `enable` did to `model`, and nothing else; returns the number of sets of experts that were enabled.

    An implementation chosen, or a forward wrapped around ours, since then stays.
    """
    return sum(decorated.revert(m) + patch.revert(m) for m in list(model.modules()))


def explain(model: nn.Module) -> EnableReport:
    """What `enable` would do, from the structure alone: nothing is run on the model, proven or changed; weights may be on "meta".

    Raises NoExpertsFound like `enable`.
    """
    candidates = _examine(model)
    _require_experts(model, candidates)
    return EnableReport(type(model).__name__, [c.report for c in candidates])


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[EnableReport]:
    """`enable(model, **options)` for the length of a `with` statement; what was enabled before stays enabled."""
    before = {m for m in model.modules() if decorated.is_enabled(m) if decorated.plan_of(m) is not None}
    before |= {m for m in model.modules() if patch.is_enabled(m)}
    report = enable(model, **options)
    try:
        yield report
    finally:
        for m in list(model.modules()):
            if m not in before:
                decorated.revert(m)
                patch.revert(m)


# ------------------------------------------------------------------------------------------------------------------------- in steps
def _examine(model: nn.Module) -> list[_Candidate]:
    candidates = []
    for found in modules.find(model):
        report = BlockReport(found.name, type(found.module).__name__, found.layout, reason=found.reason)
        if found.reason is None:
            fused = found.kind != "linear" and not found.adapted and (found.formula is None or found.formula.path == "fused")
            report.path = "fused" if fused else "composed"
            report.enabled = _is_enabled(found)
        candidates.append(_Candidate(found, report))
    _reject_shared_configs(candidates)
    return candidates


def _reject_shared_configs(candidates: list[_Candidate]) -> None:
    """Experts with a registry of their own do not know our name: where they share a config with others, none can be switched."""
    foreign = {
        id(c.found.module.config): c for c in candidates if c.found.kind == "decorated" and not decorated.can_share_config(c.found.module)
    }
    for c in candidates:
        if c.found.kind == "decorated" and c.found.formula is not None and id(c.found.module.config) in foreign:
            other = foreign[id(c.found.module.config)].found.name
            c.found.reason = c.report.reason = f"its config also steers {other}, which cannot be switched to moe_ext"


def _require_experts(model: nn.Module, candidates: list[_Candidate]) -> None:
    if not any(c.found.reason is None for c in candidates):
        raise NoExpertsFound(type(model).__name__, [c.report for c in candidates], sum(1 for _ in model.modules()))


def _is_enabled(found: modules.Found) -> bool:
    return (
        decorated.is_enabled(found.module)
        if found.kind == "decorated"
        else any(map(patch.is_enabled, (found.module, *found.module.children())))
    )


def _plan(candidates: list[_Candidate], prove: bool, quantized: str, recompute: bool) -> None:
    """Fills in plan or cuts, figures of the proof, and the reason if it fails. What held for one module is tried first on the next."""
    known: dict[type, list[patch.Cut]] = {}
    for c in candidates:
        found = c.found
        if found.reason is not None:
            continue
        if found.kind == "decorated":
            formula = found.formula.with_recompute(recompute) if found.formula is not None else None
            c.plan = decorated.StackedPlan(formula, previous=decorated.previous_implementation(found.module), proven=prove)
            proof = proofs.attempt(proofs.prove_decorated, found.module, c.plan) if prove else proofs.Proof()
        else:
            c.cuts, proof = proofs.search_and_prove(found, known.get(type(found.module)))
            known[type(found.module)] = c.cuts or known.get(type(found.module), [])
            if c.cuts:
                c.report.path = "composed" if any(cut.path == "composed" or not _fusable(cut, found.module) for cut in c.cuts) else "fused"
            for cut in (cut for cut in c.cuts if isinstance(cut, patch.Experts)):
                cut.formula = cut.formula.with_recompute(recompute)
                if quantized == "cache" and isinstance(cut.reader, listed.Listed):
                    cut.reader.cache = bitsandbytes.DenseCache()
        c.report.figures, c.report.reason = proof.figures, proof.reason


def _fusable(cut: patch.Cut, module: nn.Module) -> bool:
    weights = cut.reader.read(module) if isinstance(cut, patch.Experts) else None
    return isinstance(weights, ExpertWeights) and weights.fusable


def _note(model: nn.Module, candidates: list[_Candidate]) -> str | None:
    """What a user of a 4-bit model should know about its stacked experts; one sentence for all that are alike."""
    for c in candidates:
        note = bitsandbytes.stacked_note(model, c.found.module)
        if c.found.kind != "listed" and note is not None:
            return f"{c.found.name}: {note}"
    return None


def _apply(candidates: list[_Candidate]) -> None:
    """Switches everything that has no reason against it. Skipped experts whose config is switched are told what to run instead."""
    others = [c for c in candidates if c.found.kind != "decorated"]
    stacks = [c for c in candidates if c.found.kind == "decorated"]
    switched = {id(c.found.module.config) for c in stacks if c.report.reason is None}
    for c in stacks:
        if id(c.found.module.config) in switched:
            plan = c.plan or decorated.StackedPlan(None, previous=decorated.previous_implementation(c.found.module))
            plan.reason = c.report.reason
            c.plan = plan
    for c in stacks:
        decorated.revert(c.found.module)
        if c.plan is not None and id(c.found.module.config) in switched:
            decorated.apply(c.found.module, c.plan)
    for c in others:
        wanted = {(cut.child, cut.attribute) for cut in c.cuts} if c.report.reason is None else set()
        for name, child in [("", c.found.module), *c.found.module.named_children()]:
            if not {(name, attribute) for attribute in patch.patches_of(child)} <= wanted:
                patch.revert(child)
        if c.report.reason is None:
            for cut in c.cuts:
                patch.apply(c.found.module, cut)
    for c in candidates:
        c.report.enabled = c.report.reason is None

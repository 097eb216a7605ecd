"""`enable` a Hugging Face model, `disable` it again, `explain` what would happen.

Everything is detected and proven first and applied only then, so an exception leaves the model as it was. Decorated experts are
switched through the `experts_implementation` of their configs, all others by a method on the instance; both are taken back exactly.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from ._blocks import Block, Options, find_blocks
from .integrations.run import decorated, patch
from .integrations.usable import DISABLE_VARIABLE, disabled_by_environment
from .report import EnableError, EnableReport, NoExpertsFound

#: Proofs compare what is drawn from the global random generators, which belong to the whole process.
_ONE_AT_A_TIME = threading.RLock()


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
    if quantized not in ("recompute", "cache"):
        raise ValueError(f"quantized={quantized!r} is neither 'recompute' nor 'cache'")
    with _ONE_AT_A_TIME:
        return _enable(model, strict, Options(prove, quantized, recompute))


def _enable(model: nn.Module, strict: bool, options: Options) -> EnableReport:
    begin = time.perf_counter()
    blocks = find_blocks(model)
    report = _report(model, blocks)
    if disabled_by_environment():
        report.note = f"{DISABLE_VARIABLE} is set: nothing was enabled"
        for block in blocks:
            block.refuse(block.report.reason or f"{DISABLE_VARIABLE} is set")
        return report
    _require_experts(model, blocks)
    for block in blocks:
        block.prove(options)
    report.note = next((f"{block.report.module}: {note}" for block in blocks if (note := block.note(model)) is not None), None)
    report.seconds = time.perf_counter() - begin
    if strict and report.skipped:
        for block in blocks:
            block.report.enabled = block.is_enabled()
        raise EnableError(report)
    for block in blocks:
        block.apply()
        block.report.enabled = block.report.reason is None
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
    blocks = find_blocks(model)
    _require_experts(model, blocks)
    return _report(model, blocks)


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[EnableReport]:
    """`enable(model, **options)` for the length of a `with` statement; what was enabled before stays enabled."""
    before = {m for m in model.modules() if decorated.is_enabled(m) or patch.is_enabled(m)}
    report = enable(model, **options)
    try:
        yield report
    finally:
        for m in list(model.modules()):
            if m not in before:
                decorated.revert(m)
                patch.revert(m)


def _report(model: nn.Module, blocks: list[Block]) -> EnableReport:
    return EnableReport(type(model).__name__, [block.report for block in blocks])


def _require_experts(model: nn.Module, blocks: list[Block]) -> None:
    if all(block.report.reason is not None for block in blocks):
        raise NoExpertsFound(type(model).__name__, [block.report for block in blocks], sum(1 for _ in model.modules()))

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
from .integrations.state import State
from .integrations.usable import DISABLE_VARIABLE, disabled_by_environment
from .report import EnableError, EnableReport, NoExpertsFound

#: Proofs compare what is drawn from the global random generators, which belong to the whole process.
_ONE_AT_A_TIME = threading.RLock()


def register() -> None:
    """Adds moe_ext to the experts implementations of transformers.

    `import moe_ext` does this by itself, as soon as transformers is loaded. Call it to see the error where it cannot be done.
    `from_pretrained(..., experts_implementation="moe_ext")` and `set_experts_implementation("moe_ext")` work afterwards. Experts that are
    only given the name are detected at their first forward and are not proven.

    Raises:
        ImportError: If transformers is older than 5.
    """
    decorated.register()


def enable(
    model: nn.Module,
    strict: bool = False,
    prove: bool = True,
    quantized: Literal["recompute", "cache"] = "recompute",
    recompute: bool = False,
) -> EnableReport:
    """Makes moe_ext compute the experts of a model, in place.

    The experts are found, proven and only then switched, so an exception leaves the model as it was. Calling it again finds and proves
    again. With MOE_EXT_DISABLE=1 in the environment nothing is switched, and the report says so.

    Args:
        model: Any module. Its router, parameters and checkpoint format are left unchanged.
        strict: Whether to raise an error if any set of experts would be skipped.
        prove: Whether to compare old and new on random tokens first, forward and backward. Experts that do not obey the error rule
            (`moe_ext.testing`) are skipped, with the figures as the reason. False spares the proof for decorated experts, whose flags
            state their layout. All others are proven in any case.
        quantized: What to do with 4-bit experts. "recompute" dequantizes those that have tokens at each forward and backward, into a
            bounded workspace. "cache" keeps dense copies of all that have had tokens, until their 4-bit bytes change.
        recompute: Whether training keeps less memory and computes the up projection twice, as in `ExpertSpec`. It applies to blocks whose
            path is "fused".

    Returns:
        A report with one row for each set of experts: enabled, or the reason why not.

    Raises:
        NoExpertsFound: If no module is a set of experts that moe_ext can compute, now or when a reason like offloaded weights has passed.
            The message lists what was looked at.
        EnableError: If strict is set and any set of experts would be skipped. It holds the report.
        ValueError: If quantized is neither of the two.
        RuntimeError: If the model's code, run on a copy, changed the model itself. The message names what; it was put back.
    """
    if quantized not in ("recompute", "cache"):
        raise ValueError(f"quantized={quantized!r} is neither 'recompute' nor 'cache'")
    with _ONE_AT_A_TIME:
        return _enable(model, strict, Options(prove, quantized, recompute))


def _enable(model: nn.Module, strict: bool, options: Options) -> EnableReport:
    begin = time.perf_counter()
    state = State(model)
    try:
        blocks = find_blocks(model)
        report = _report(model, blocks)
        if not disabled_by_environment():
            _require_experts(model, blocks)
            for block in blocks:
                block.prove(options)
    finally:
        _require_unchanged(model, state)
    if disabled_by_environment():
        report.note = f"{DISABLE_VARIABLE} is set: nothing was enabled"
        for block in blocks:
            block.refuse(block.report.reason or f"{DISABLE_VARIABLE} is set")
        return report
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
    """Takes back what `enable` did to a model, and nothing else.

    An experts implementation that was chosen since then stays, and so does a forward that was wrapped around ours.

    Args:
        model: The model, or a part of it.

    Returns:
        The number of sets of experts that were enabled.
    """
    return sum(decorated.revert(m) + patch.revert(m) for m in list(model.modules()))


def explain(model: nn.Module) -> EnableReport:
    """Reports what `enable` would do, from the structure alone: nothing is run, proven or changed.

    Args:
        model: Any module. Its weights may be on the meta device.

    Returns:
        A report with one row for each set of experts.

    Raises:
        NoExpertsFound: If no module is a set of experts that moe_ext can compute.
    """
    blocks = find_blocks(model)
    _require_experts(model, blocks)
    return _report(model, blocks)


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[EnableReport]:
    """Enables a model for the length of a `with` statement. What was enabled before stays enabled.

    Args:
        model: Any module.
        **options: Those of `enable`.

    Yields:
        The report of `enable`.
    """
    before = {m for m in model.modules() if decorated.is_enabled(m) or patch.is_enabled(m)}
    report = enable(model, **options)
    try:
        yield report
    finally:
        for m in list(model.modules()):
            if m not in before:
                decorated.revert(m)
                patch.revert(m)


def _require_unchanged(model: nn.Module, state: State) -> None:
    """Puts back what a proof has changed in the model, and raises an error with its name: no proof should."""
    changed = state.put_back()
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise RuntimeError(f"a proof changed {', '.join(changed[:4])}{more} of {type(model).__name__}; it was put back, nothing is enabled")


def _report(model: nn.Module, blocks: list[Block]) -> EnableReport:
    return EnableReport(type(model).__name__, [block.report for block in blocks])


def _require_experts(model: nn.Module, blocks: list[Block]) -> None:
    if all(block.report.reason is not None and not block.may_pass for block in blocks):
        raise NoExpertsFound(type(model).__name__, [block.report for block in blocks], sum(1 for _ in model.modules()))

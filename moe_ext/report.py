"""What `enable` and `explain` return and raise: one row per set of experts, as text and as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .testing import ErrorReport


@dataclass
class BlockReport:
    """One set of experts.

    Attributes:
        module: Its name in the model.
        class_name: Its class.
        layout: How its weights are stored.
        path: What a forward runs: "fused" (one op), "composed" (the steps as ops) or "original" (the model's own code).
        enabled: Whether moe_ext computes it now.
        reason: Why it is skipped. None if it is enabled or can be.
        figures: The errors of the proof, by quantity.
    """

    module: str
    class_name: str
    layout: str
    path: str = "original"
    enabled: bool = False
    reason: str | None = None
    figures: Mapping[str, ErrorReport] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """One of "enabled", "can be enabled", or the reason why not."""
        return "enabled" if self.enabled else self.reason or "can be enabled"

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as data for JSON."""
        figures = {name: {"error": r.new, "plain": r.plain, "ratio": r.ratio} for name, r in self.figures.items()}
        return {
            "module": self.module, "class": self.class_name, "layout": self.layout, "path": self.path,
            "enabled": self.enabled, "reason": self.reason, "proof": figures or None,
        }  # fmt: skip


@dataclass
class EnableReport:
    """The report for a whole model. `str(report)` is a table in which consecutive layers that are alike share a row.

    Attributes:
        model: The class of the model.
        blocks: One report for each set of experts.
        note: What else there is to know, or None.
        seconds: How long finding and proving took.
    """

    model: str
    blocks: list[BlockReport]
    note: str | None = None
    seconds: float = 0.0

    @property
    def enabled_count(self) -> int:
        """The number of sets of experts that moe_ext computes now."""
        return sum(block.enabled for block in self.blocks)

    @property
    def skipped(self) -> list[BlockReport]:
        """The blocks that have a reason why moe_ext does not compute them."""
        return [block for block in self.blocks if block.reason is not None]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as data for JSON."""
        return {
            "model": self.model, "enabled_count": self.enabled_count, "seconds": self.seconds, "note": self.note,
            "blocks": [block.to_dict() for block in self.blocks],
        }  # fmt: skip

    def __str__(self) -> str:
        rows = [(name, b.class_name, b.layout, b.path, b.status) for name, b in _grouped(self.blocks)]
        lines = _table([("module", "class", "layout", "path", "status"), *rows])
        return "\n".join([*lines, self._totals(), *([self.note] if self.note else [])])

    def _totals(self) -> str:
        count, proven = len(self.blocks), sum(bool(b.figures) and b.enabled for b in self.blocks)
        paths = [f"{n} {path}" for path in ("fused", "composed") if (n := sum(b.path == path and b.enabled for b in self.blocks))]
        parts = [f"{self.enabled_count} of {count} expert block{'s' * (count != 1)} enabled" + (f" ({', '.join(paths)})" if paths else "")]
        possible = sum(not b.enabled and b.reason is None for b in self.blocks)
        parts += [f"{possible} can be enabled"] if possible else []
        parts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        parts += [f"{proven} proven in {self.seconds:.1f} s"] if proven else []
        return f"{self.model}: {', '.join(parts)}"


class NoExpertsFound(ValueError):
    """No module of the model is a set of experts that moe_ext can compute. The message lists what was looked at.

    Attributes:
        model: The class of the model.
        rejected: The sets of experts that were found, each with the reason why it is left alone.
    """

    def __init__(self, model: str, rejected: Iterable[BlockReport], modules: int) -> None:
        self.model = model
        self.rejected = list(rejected)
        text = f"{model} has no experts that moe_ext can compute"
        if self.rejected:
            lines = [f"  {name} ({b.class_name}): {b.reason}" for name, b in _grouped(self.rejected)]
            text += "; what looks like experts, and why it was left alone:\n" + "\n".join(lines)
        else:
            text += f": none of its {modules} modules holds experts (stacked 3-D weights, or a ModuleList of MLPs named `experts`)"
        super().__init__(text)


class EnableError(RuntimeError):
    """`enable(strict=True)` would have had to skip experts. The model is unchanged.

    Attributes:
        report: What was found.
    """

    def __init__(self, report: EnableReport) -> None:
        self.report = report
        count = f"{len(report.skipped)} of {len(report.blocks)} expert blocks"
        super().__init__(f"strict=True, and {count} would be skipped; nothing was changed\n{report}")


def _grouped(blocks: list[BlockReport]) -> list[tuple[str, BlockReport]]:
    """Runs of blocks that differ in one number of their names only, as `layers.{0-47}.mlp` with the first of them."""
    groups: list[tuple[list[str], BlockReport]] = []
    for block in blocks:
        if groups:
            names, first = groups[-1]
            alike = (first.class_name, first.layout, first.path, first.status) == (block.class_name, block.layout, block.path, block.status)
            if alike and _span([*names, block.module]) is not None:
                names.append(block.module)
                continue
        groups.append(([block.module], block))
    return [(_span(names) or names[0], first) for names, first in groups]


def _span(names: list[str]) -> str | None:
    """`["a.0.b", "a.1.b"]` to `"a.{0-1}.b"`; None when the names differ otherwise."""
    if len(names) < 2:
        return None
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(p) for p in pieces}) > 1:
        return None
    varying = [i for i in range(len(pieces[0])) if len({p[i] for p in pieces}) > 1]
    if len(varying) != 1 or varying[0] % 2 == 0:
        return None
    numbers = [int(p[varying[0]]) for p in pieces]
    step = numbers[1] - numbers[0]
    if step < 1 or any(b - a != step for a, b in zip(numbers, numbers[1:], strict=False)):
        return None
    first = list(pieces[0])
    first[varying[0]] = f"{{{numbers[0]}-{numbers[-1]}{f' step {step}' if step > 1 else ''}}}"
    return "".join(first)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = max(len(rows[0][-1]), *(len(line) for line in lines)) if len(lines) > 1 else len(lines[0])
    return [lines[0], "-" * min(rule, 140), *lines[1:]]

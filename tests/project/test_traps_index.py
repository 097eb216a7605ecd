"""The numbered correctness traps, T1 to T100: each has a test named after it, or a comment in a test file that says why it needs none."""

from __future__ import annotations

import re
from pathlib import Path

TRAPS = range(1, 101)


def test_every_trap_has_a_test_or_a_reason() -> None:
    tests: set[int] = set()
    reasons: set[int] = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        text = path.read_text()
        for name in re.findall(r"^def (test_T\w+)", text, re.MULTILINE):
            tests |= {int(n) for n in re.findall(r"T(\d+)(?=_|$)", name)}
        tests |= {int(n) for n in re.findall(r'^\s*"T(\d+)_\w+": ', text, re.MULTILINE)}  # the id of a case of such a test
        for comment in re.findall(r"^\s*# .*$|^T\d+.*$", text, re.MULTILINE):  # a comment, or a line of a module's docstring
            reasons |= {n for a, b in re.findall(r"\bT(\d+)(?: to T(\d+))?", comment) for n in range(int(a), int(b or a) + 1)}
    missing = [f"T{n}" for n in TRAPS if n not in tests | reasons]
    assert not missing, f"neither a test nor a reason for {', '.join(missing)}"

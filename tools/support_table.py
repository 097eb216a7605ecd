"""docs/SUPPORT.md from docs/support-transformers-*.json: `python -m tools.support_table` writes it, `--check` only looks at it.

The files are results of tests, one for each version of transformers:
    python -m pytest tests/integrations/test_architectures.py --support-json docs/support-transformers-VERSION.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCS / "SUPPORT.md"

#: architectures by version of transformers, then by name
Results = dict[str, dict[str, dict[str, Any]]]

HEAD = """# Which architectures are supported

Each Mixture-of-Experts architecture of transformers is tested as a tiny model with random weights, in float32 and bfloat16, in training and
in evaluation. Its output and the gradients of all parameters are compared with those of the unpatched model, with float64 as the truth. The
number of sets of experts is checked, and that the model returns the same bits as before after `disable`. A name with a suffix is a variant
of a config.

A cell gives the path, the number of sets of experts, and the largest errors of the output and of the gradients, as multiples of the errors
that the unpatched model makes. The limit is 2. "fused" is one op. "composed" runs the steps as ops, with the model's own gate or norm
between them. "skipped" runs the model's own code.

This file is generated from the results of `tests/integrations/test_architectures.py` by `tools/support_table.py`.
"""


def read(folder: Path = DOCS) -> Results:
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("support-transformers-*.json")))
    return {one["transformers"]: one["architectures"] for one in found}


def worst(row: dict[str, Any], direction: str) -> float | None:
    return max((value for name, value in row.items() if name.endswith(f" {direction}")), default=None)


def totals(version: str, rows: dict[str, dict[str, Any]]) -> str:
    paths = Counter(row["path"] for row in rows.values())
    counts = ", ".join(f"{paths[path]} {path}" for path in ("fused", "composed", "skipped", "fails") if paths[path])
    errors = [max(filter(None, (worst(row, d) for row in rows.values())), default=0.0) for d in ("forward", "backward")]
    return f"- transformers {version}: {len(rows)} architectures, {counts}; errors up to {errors[0]:.2f} and {errors[1]:.2f}"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    text = row["path"] if row["blocks"] == 1 else f"{row['path']} ({row['blocks']})"
    forward, backward = worst(row, "forward"), worst(row, "backward")
    return text if forward is None else f"{text}, {forward:.2f} / {backward:.2f}"


def markdown(results: Results) -> str:
    names = sorted({name for rows in results.values() for name in rows})
    lines = [HEAD, *(totals(version, rows) for version, rows in results.items()), ""]
    lines += ["| architecture | " + " | ".join(f"transformers {v}" for v in results) + " | reason |", "|---" * (len(results) + 2) + "|"]
    for name in names:
        rows = [rows.get(name) for rows in results.values()]
        reasons = dict.fromkeys(row["reason"].replace("|", r"\|") for row in rows if row and row["reason"])
        lines.append(f"| {name} | " + " | ".join(map(cell, rows)) + f" | {'; '.join(reasons)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    expected = markdown(read())
    if "--check" not in arguments:
        TABLE.write_text(expected)
    elif not TABLE.exists() or TABLE.read_text() != expected:
        print(f"{TABLE} is not what the results beside it give; `python -m tools.support_table` writes it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

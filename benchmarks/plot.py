"""Draws a result of bench_grouped_forward.py: `python -m benchmarks.plot [RESULT.json] [IMAGE.svg]`.

One panel for each mode and dtype: milliseconds over tokens, a line per candidate with the 20th to 80th percentile. A candidate that was
not measured at a number of tokens has no point there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLORS = {
    "eager": "#999999", "batched_mm": "#cc79a7", "grouped_mm": "#e69f00", "ModuleList loop": "#009e73", "moe_ext": "#0b4f8a",
    "moe_ext list": "#56b4e9",
}  # fmt: skip
TITLES = {"forward": "forward", "frozen": "forward and backward,\nexperts frozen", "full": "forward and backward,\nall trainable"}


def draw(result: dict[str, Any], image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "moe_ext", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    from matplotlib import pyplot

    rows = result["rows"]
    modes = [mode for mode in TITLES if any(r["mode"] == mode for r in rows)]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, panels = pyplot.subplots(len(dtypes), len(modes), figsize=(9, 3 * len(dtypes) + 0.6), sharex=True, squeeze=False)
    for line, dtype in zip(panels, dtypes, strict=True):
        for panel, mode in zip(line, modes, strict=True):
            for name, color in COLORS.items():
                times = {r["tokens"]: r["ms"].get(name) for r in rows if (r["mode"], r["dtype"]) == (mode, dtype)}
                points = [(tokens, t) for tokens, t in sorted(times.items()) if t and t["median"] is not None]
                if not points:
                    continue
                x, y = [tokens for tokens, _ in points], [t["median"] for _, t in points]
                panel.fill_between(x, [t["p20"] for _, t in points], [t["p80"] for _, t in points], color=color, alpha=0.2, linewidth=0)
                panel.plot(x, y, "o-", color=color, label=name, markersize=3.5, linewidth=2 if name.startswith("moe_ext") else 1.2)
            panel.set(xscale="log", yscale="log", title=f"{TITLES[mode]}, {dtype}")
            panel.set_xticks(sorted({r["tokens"] for r in rows}), sorted({r["tokens"] for r in rows}), minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        line[0].set_ylabel("milliseconds")
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(image, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=ROOT / "benchmarks/results/grouped_forward_cpu.json")
    parser.add_argument("image", type=Path, nargs="?", default=ROOT / "docs/images/grouped_forward_cpu.svg")
    arguments = parser.parse_args()
    draw(json.loads(arguments.result.read_text()), arguments.image)
    print(f"wrote {arguments.image}")


if __name__ == "__main__":
    main()

"""The tables of the speed phase: gpu-speed.csv and gpu-speed.md."""

from __future__ import annotations

import csv
import io
from typing import Any

from benchmarks.gpu.cases import BYTES_PER_SECOND, FLOPS_PER_SECOND, Record
from benchmarks.harness import markdown_table

COLUMNS = (
    *("shape", "mode", "T", "launch", "candidate", "p20 ms", "p50 ms", "p80 ms", "TFLOP/s", "GB/s", "of cuBLAS", "of floor"),
    *("candidate / moe_ext", "error"),
)


def rows(data: Record) -> list[tuple[Any, ...]]:
    found = []
    for r in data["results"].values():
        for name, c in r["candidates"].items():
            values = (c["p20"], c["p50"], c["p80"], c["tflops"], c["gb_per_s"], c["of_cublas"], c["of_floor"])
            numbers = (*values, r["ratios"].get(name), c.get("error"))
            found.append((r["shape"], r["mode"], r["tokens"], r["launch"], name, *("" if v is None else f"{v:.4g}" for v in numbers)))
    return found


def as_csv(data: Record) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows(data)])
    return text.getvalue()


def as_markdown(data: Record) -> str:
    m, v = data["machine"], data["versions"]
    head = f"{m['gpu']}, {m['cores']} processor cores, torch {v['torch']}, CUDA {v['cuda']}; CUDA sources {data['digest']}."
    if data["device"] != "cuda":
        head = f"A trial of the program on the {data['device']}: nothing here is a measurement of a GPU. " + head
    goals = [
        (r["shape"], r["mode"], r["tokens"], r["launch"], _subject(g), *(f"{g[k]:.4g}" for k in ("must", "target", "value")), g["verdict"])
        for r in data["results"].values()
        for g in r["goals"]
    ]
    memory = [
        (r["shape"], r["tokens"], name, *(_megabytes(c.get(k)) for k in ("saved", "saved_frozen", "peak_full", "peak_frozen")))
        for r in data["results"].values()
        for name, c in r.get("memory", {}).items()
    ]
    parts = [
        "# The expert layer on a GPU\n",
        head,
        "bfloat16; CUDA events; candidates take turns; at least 20 ms per sample, rotating inputs of random normal numbers. The floor is "
        f"the larger of FLOPs / {FLOPS_PER_SECOND / 1e12:g} TFLOP/s and bytes / {BYTES_PER_SECOND / 1e12:g} TB/s. Routing is given; "
        "sorting by expert is part of what is timed, except for `torch grouped_mm alone`, which is two products over sorted rows.\n",
        "## Goals\n",
        markdown_table(("shape", "mode", "T", "launch", "what", "must", "target", "measured", ""), goals),
        "## Times\n",
        markdown_table(COLUMNS, rows(data)),
        "## Memory, MB\n",
        "Saved for the backward (weights excluded), and the peak of forward and backward beyond weights and inputs.\n",
        markdown_table(("shape", "T", "candidate", "saved", "saved, frozen", "peak", "peak, frozen"), memory),
        "## Not measured\n",
        *(f"- {reason} ({'; '.join(where)})" for reason, where in reasons(data).items()),
    ]
    return "\n".join(parts) + "\n"


def reasons(data: Record) -> dict[str, list[str]]:
    """Why something was not measured, or is wrong, to where."""
    found: dict[str, list[str]] = {}
    for key, reason in data["left_out"].items():
        found.setdefault(reason, []).append(key)
    for key, r in data["results"].items():
        for name, reason in r["left_out"].items():
            found.setdefault(f"{name}: {reason}", []).append(key)
        for name, c in r["candidates"].items():
            if "wrong" in c:
                found.setdefault(f"{name} is WRONG: {c['wrong']}", []).append(key)
    return found


def _subject(goal: Record) -> str:
    return f"{goal['of']} / moe_ext" if goal["unit"] == "x" else f"{goal['of']}, {goal['unit']}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"

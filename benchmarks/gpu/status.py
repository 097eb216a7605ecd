"""What has been run on a GPU, and whether today's CUDA sources are the ones it was run with: `python -m benchmarks.gpu.status`.

Reads benchmarks/results/gpu-{correctness,speed,profile}*.json (benchmarks/gpu/run.py writes them) and nothing else. With `--docs`
it writes the block of GPU figures in docs/benchmarks.md, between the two markers, from the same files. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from build_tools.sources import digest as digest
from build_tools.sources import source_digests as digests_of_sources

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PHASES = ("correctness", "speed", "profile")
BEGIN = "<!-- GPU figures: written from benchmarks/results/gpu-*.json -->"
END = "<!-- end of the GPU figures -->"

Result = dict[str, Any]


# ---- sources
def source_digests(root: Path = ROOT) -> dict[str, str]:
    """Path to digest, of every source on disk that a CUDA library would be made of."""
    return digests_of_sources(root)


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that differ, in words."""
    words = [f"{path} (new)" if path not in then else path for path, value in now.items() if then.get(path) != value]
    return sorted([*words, *(f"{path} (gone)" for path in then if path not in now)])


# ---- results
def read_results(folder: Path = RESULTS) -> tuple[dict[str, Result], list[str]]:
    """The newest results of each phase, and what was refused and why."""
    newest: dict[str, Result] = {}
    refused = []
    for path in sorted(folder.glob("gpu-*.json")):
        try:
            found = json.loads(path.read_text())
            phase, device, date = found["phase"], found["device"], last_date(found)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            refused.append(f"{path.name}: not a result of benchmarks.gpu.run ({type(error).__name__}: {error})")
            continue
        if device != "cuda":
            refused.append(f"{path.name}: made on the {device}, a trial of the program; nothing was measured")
        elif phase not in newest or date > last_date(newest[phase]):
            newest[phase] = found
    return newest, refused


def last_date(result: Result) -> str:
    return str(result["runs"][-1]["date"])


def failures(result: Result) -> dict[str, str]:
    """Tests that failed, and cases in which moe_ext was wrong or did not run, with what was said."""
    failed = {}
    for key, r in result["results"].items():
        if r.get("outcome") == "failed":
            failed[key] = r["message"]
        if reason := r.get("candidates", {}).get("moe_ext", {}).get("wrong") or r.get("left_out", {}).get("moe_ext"):
            failed[f"{key} moe_ext"] = reason
    return failed


def status(results: Mapping[str, Result], refused: list[str], sources: Mapping[str, str]) -> str:
    today = digest(sources)
    lines = [f"CUDA sources of today: {today} ({len(sources)} files)"]
    for phase in PHASES:
        if (result := results.get(phase)) is None:
            lines.append(f"{phase}: never run on a GPU")
            continue
        where = f"{len(result['results'])} results, {result['machine']['gpu']}, {last_date(result)}"
        if result["digest"] == today:
            lines.append(f"{phase}: current ({where})")
        else:
            lines.append(f"{phase}: stale ({where}; sources {result['digest']})")
            if result["sources"]:
                lines += [f"  changed since: {name}" for name in changes(result["sources"], sources)]
            else:
                lines.append("  the library that ran was made of other sources than lay beside it")
        older = sorted({name for run in result["runs"] for name in run.get("library", {}).get("older_than", ())})
        lines += [f"  the library that ran was older than {name}" for name in older]
        lines += [f"  failed: {key}: {message}" for key, message in failures(result).items()]
        lines += [f"  left out: {key}: {reason}" for key, reason in result["left_out"].items()]
    return "\n".join([*lines, *(f"refused: {text}" for text in refused)])


# ---- the page
def figures_block(results: Mapping[str, Result]) -> str:
    """Everything between the markers, markers included."""
    parts = [BEGIN]
    if not results:
        parts.append("No figure has been measured on a GPU yet, and no test has run on one.")
    if tests := results.get("correctness"):
        passed = sum(r["outcome"] == "passed" for r in tests["results"].values())
        skipped = sum(r["outcome"] == "skipped" for r in tests["results"].values())
        failed, missing = len(failures(tests)), len(tests["left_out"])
        parts.append(
            f"Tests on a GPU ({_where(tests)}): {passed} passed, {failed} failed, {skipped} skipped, {missing} not run "
            "(`benchmarks/results/gpu-correctness.json`)."
        )
    elif results:
        parts.append("The tests have not run on a GPU yet.")
    if speed := results.get("speed"):
        parts += [
            f"Speed ({_where(speed)}; bfloat16, medians of candidates that take turns; goals are must / target, `-` where none is set). "
            "Everything measured, with percentiles and peers: `benchmarks/results/gpu-speed.md`.",
            "\n".join(_speed_table(speed)),
        ]
    elif results:
        parts.append("No figure has been measured on a GPU yet.")
    if results:
        parts.append("`make gpu-status` says whether the sources have changed since.")
    return "\n\n".join([*parts, END])


def _where(result: Result) -> str:
    return f"{result['machine']['gpu']}, torch {result['versions']['torch']}, {last_date(result)[:10]}, sources {result['digest']}"


def _speed_table(speed: Result) -> list[str]:
    lines = ["| layer | T | mode | launch | ms | TFLOP/s | of cuBLAS | of the floor | grouped_mm / moe_ext | goal | |", "|" + "---|" * 11]
    for r in speed["results"].values():
        ours = r["candidates"].get("moe_ext", {})
        if "p50" not in ours:
            continue
        goal = next((g for g in r["goals"] if g["of"] == "moe_ext"), None)
        goals = f"{goal['must']:g} / {goal['target']:g} {goal['unit']}" if goal else "-"
        ratio = r["ratios"].get("transformers grouped_mm")
        cells = (
            *(r["shape"], r["tokens"], r["mode"], r["launch"], f"{ours['p50']:.4g}", f"{ours['tflops']:.4g}"),
            *(_percent(ours.get("of_cublas")), _percent(ours["of_floor"]), f"{ratio:.2f}" if ratio else "-"),
            *(goals, goal["verdict"] if goal else ""),
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def with_block(page: str, block: str) -> str:
    before, rest = page.split(BEGIN)
    return before + block + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of gpu-*.json")
    parser.add_argument("--docs", action="store_true", help="write the block of GPU figures in docs/benchmarks.md")
    options = parser.parse_args()
    results, refused = read_results(options.results)
    print(status(results, refused, source_digests()))
    if options.docs:
        PAGE.write_text(with_block(PAGE.read_text(), figures_block(results)))
        print(f"wrote the GPU figures of {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

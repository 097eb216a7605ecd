"""Interleaved timing (A B C A B C ...), so that a machine that slows down slows every candidate; medians with the 20th and 80th
percentile; results as JSON and as Markdown, with the machine they were made on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Candidate:
    """What is timed. `run`'s result is dropped outside the measured time. `skip` is a reason known beforehand; `estimate` returns
    the seconds that a call would take where even one call may be too many."""

    name: str
    run: Callable[[], Any]
    skip: str | None = None
    estimate: Callable[[], float] | None = None


@dataclass
class Timing:
    """Milliseconds, or the reason why there are none."""

    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    skipped: str | None = None


def measure(candidates: Sequence[Candidate], seconds: float, longest: float, rounds: tuple[int, int] = (3, 50)) -> dict[str, Timing]:
    """Times all candidates in turns until `seconds` have passed, within `rounds` (least, most).

    A candidate whose call takes (or is estimated to take) more than `longest` seconds is skipped, and the reason kept.
    """
    timings = {c.name: Timing(skipped=c.skip) for c in candidates}
    alive: list[Candidate] = []
    for c in candidates:
        if c.skip:
            continue
        expected = c.estimate() if c.estimate else 0.0
        word = "about "
        if expected <= longest:
            word, expected = "", _call(c)  # the first call warms up, and is not counted
        if expected > longest:
            timings[c.name].skipped = f"one call takes {word}{expected:.3g} s, more than {longest:g} s"
        else:
            alive.append(c)
    samples: dict[str, list[float]] = {c.name: [] for c in alive}
    end = time.perf_counter() + seconds
    for done in range(rounds[1]):
        if not alive or (done >= rounds[0] and time.perf_counter() > end):
            break
        for c in alive:
            samples[c.name].append(_call(c))
    for name, values in samples.items():
        low, high = quantile(values, 0.2), quantile(values, 0.8)
        timings[name] = Timing(1e3 * statistics.median(values), 1e3 * low, 1e3 * high, len(values))
    return timings


def _call(candidate: Candidate) -> float:
    start = time.perf_counter()
    result = candidate.run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, round(q * (len(values) - 1)))]


def ceiling(dtype: torch.dtype, size: int = 2048, megabytes: int = 512, rounds: int = 5) -> dict[str, float]:
    """What the machine gives at best: one dense product of size^3 (GFLOP/s), reading and copying a large tensor (GB/s moved).

    The product is `a @ b.T`, as in a linear layer: without native bfloat16, torch's `a @ b` is ten times slower.
    """
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    big = torch.ones(megabytes << 18)  # float32: the width of what is read does not matter, the cost of a conversion would
    target = torch.empty_like(big)
    timings = measure(
        [
            Candidate("mm", lambda: torch.mm(a, b.T)),
            Candidate("read", lambda: big.sum()),
            Candidate("copy", lambda: target.copy_(big)),
        ],
        seconds=0,
        longest=float("inf"),
        rounds=(rounds, rounds),
    )
    best = {name: t.p20 for name, t in timings.items() if t.p20}
    return {
        "mm_gflops": 2 * size**3 / best["mm"] / 1e6,
        "read_gb_per_s": big.nbytes / best["read"] / 1e6,
        "copy_gb_per_s": 2 * big.nbytes / best["copy"] / 1e6,
    }


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures, and nothing that names the machine."""
    cpu, flags = platform.processor() or "unknown", set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", "").split())
    interesting = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instruction_sets": [flag for flag in interesting if flag in flags],
        "memory_gib": round(memory, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def milliseconds(t: Timing) -> str:
    if t.median is None:
        return "-"
    digits = 0 if t.median >= 1000 else 1 if t.median >= 10 else 2 if t.median >= 1 else 3
    return f"{t.median:.{digits}f} [{t.p20:.{digits}f}-{t.p80:.{digits}f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(name: str, data: dict[str, Any], markdown: str) -> list[Path]:
    """`results/NAME.json` and `results/NAME.md`."""
    RESULTS.mkdir(exist_ok=True)
    paths = [RESULTS / f"{name}.json", RESULTS / f"{name}.md"]
    paths[0].write_text(json.dumps(data, indent=1, default=asdict) + "\n")
    paths[1].write_text(markdown)
    return paths

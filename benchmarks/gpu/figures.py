"""What a time means: FLOPs, bytes and the floor of a mode of the expert layer, the goals, and the tables of gpu-speed.md and .csv.

S = T K rows, b bytes per element, `hit` experts with tokens. FLOPs count no padding; a floor is the larger of FLOPs over the rate of
a dense product and bytes over the bandwidth, both as measured on an H200. Bytes are read once and written once:
forward-inference 3bHI hit + 2bTH + bS(2I + 2H); forward-training + 2bSI; backward-full 3bHI (hit + E) + 4bTH + bS(10I + 2H);
backward-frozen 3bHI hit + 2bTH + bS(6I + 2H).
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import markdown_table
from benchmarks.shapes import Shape

MODES = ("forward-inference", "forward-training", "backward-full", "backward-frozen")
FLOPS_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.3e12  # H200: bf16 product of random data; copy, counting reads and writes
OURS, CUBLAS = "moe_ext", "cuBLAS, same FLOPs"
GROUPED_MM, TRANSFORMERS, COMPILED = "torch grouped_mm alone", "transformers grouped_mm", "transformers grouped_mm, compiled"
LIGER, SCATTERMOE, SONICMOE = "Liger", "ScatterMoE", "SonicMoE"
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the table. launch: eager, or graph for the replay of a CUDA graph."""

    shape: Shape
    mode: str
    tokens: int
    launch: str = "eager"
    routing: str = "uniform"

    @property
    def key(self) -> str:
        return f"{self.shape.name} {self.mode} T={self.tokens} {self.launch}" + (f" {self.routing}" if self.routing != "uniform" else "")

    def flops(self) -> int:
        return {"backward-full": 12}.get(self.mode, 6) * self.tokens * self.shape.K * self.shape.H * self.shape.I

    def bytes(self, hit: float, b: int = 2) -> float:
        s, T = self.shape, self.tokens
        weights, rows = 3 * b * s.H * s.I, b * T * s.K
        if self.mode == "backward-full":
            return weights * (hit + s.E) + 4 * b * T * s.H + rows * (10 * s.I + 2 * s.H)
        wide = {"forward-inference": 2, "forward-training": 4, "backward-frozen": 6}[self.mode]
        return weights * hit + 2 * b * T * s.H + rows * (wide * s.I + 2 * s.H)

    def floor_ms(self, hit: float) -> float:
        return 1e3 * max(self.flops() / FLOPS_PER_SECOND, self.bytes(hit) / BYTES_PER_SECOND)

    def saved_bytes(self, frozen: bool) -> int:
        """What a forward may keep for its backward: 2H + 4kI + 16k bytes per token in bfloat16, no x when frozen; and the offsets."""
        s = self.shape
        return self.tokens * ((0 if frozen else 2 * s.H) + 4 * s.K * s.I + 16 * s.K) + 4 * (s.E + 1)


# ---- goals
@dataclass(frozen=True)
class Goal:
    """`unit` TFLOP/s or x (a peer's time over ours) is to be reached, ms is not to be exceeded. `of`: our candidate, or the peer."""

    shape: str
    modes: tuple[str, ...]
    tokens: tuple[int, int]  # from, to
    must: float
    target: float
    unit: str
    of: str = OURS
    launch: str = "eager"

    def applies(self, case: Case) -> bool:
        inside = self.tokens[0] <= case.tokens <= self.tokens[1]
        return (case.shape.name, case.launch) == (self.shape, self.launch) and case.mode in self.modes and inside

    def judge(self, value: float) -> Record:
        def met(goal: float) -> bool:
            return value <= goal if self.unit == "ms" else value >= goal

        verdict = "target met" if met(self.target) else "must met" if met(self.must) else "missed"
        return {"of": self.of, "unit": self.unit, "must": self.must, "target": self.target, "value": value, "verdict": verdict}


FORWARD, BACKWARD, MANY = MODES[:2], MODES[2:], 10**9
GOALS = (
    Goal("qwen3", FORWARD, (16384, MANY), 500, 550, "TFLOP/s"),
    Goal("qwen3", ("backward-full",), (16384, MANY), 480, 540, "TFLOP/s"),
    Goal("qwen3", ("backward-frozen",), (16384, MANY), 460, 520, "TFLOP/s"),
    Goal("qwen3", FORWARD, (4096, 4096), 0.70, 0.62, "ms"),
    Goal("qwen3", FORWARD, (1024, 1024), 0.48, 0.42, "ms"),
    Goal("qwen3", FORWARD, (64, 64), 0.42, 0.36, "ms"),
    Goal("qwen3", ("forward-inference",), (1, 1), 0.060, 0.035, "ms", launch="graph"),
    Goal("mixtral", FORWARD, (8192, MANY), 600, 650, "TFLOP/s"),
    *(
        Goal("qwen3", modes, tokens, least, least, "x", peer)
        for peer, modes, tokens, least in (
            (TRANSFORMERS, FORWARD, (1, MANY), 1.8),
            (TRANSFORMERS, BACKWARD, (1, MANY), 2.0),
            (LIGER, FORWARD, (1, MANY), 1.5),
            (LIGER, BACKWARD, (1, MANY), 2.0),
            (SONICMOE, MODES[:3], (8192, MANY), 0.95),
            (SONICMOE, MODES[:3], (1, 1024), 1.0),
            (SONICMOE, ("backward-frozen",), (1, MANY), 1.8),
        )
    ),
)


def derive(case: Case, hit: float, candidates: dict[str, Record]) -> Record:
    """Everything that follows from the times: TFLOP/s, GB/s, shares of cuBLAS and of the floor, ratios, goals."""
    floor, cublas = case.floor_ms(hit), candidates.get(CUBLAS, {}).get("p50")
    ours = candidates.get(OURS, {}).get("p50")
    for c in candidates.values():
        c["tflops"] = case.flops() / c["p50"] / 1e9
        c["gb_per_s"] = case.bytes(hit) / c["p50"] / 1e6
        c["of_floor"] = floor / c["p50"]
        c["of_cublas"] = cublas / c["p50"] if cublas else None
    ratios = {name: c["p50"] / ours for name, c in candidates.items() if ours and name != OURS}
    values = {"TFLOP/s": candidates.get(OURS, {}).get("tflops"), "ms": ours}
    judged = [(goal, ratios.get(goal.of) if goal.unit == "x" else values[goal.unit]) for goal in GOALS if goal.applies(case)]
    return {
        "shape": case.shape.name, "mode": case.mode, "tokens": case.tokens, "launch": case.launch, "routing": case.routing,
        "flops": case.flops(), "bytes": case.bytes(hit), "experts_hit": hit, "floor_ms": floor, "candidates": candidates,
        "ratios": ratios, "goals": [goal.judge(value) for goal, value in judged if value is not None],
    }  # fmt: skip


def judge_memory(case: Case, memory: Record) -> list[Record]:
    """What we keep for the backward: at most the formula's bytes, and at most a third of what transformers keeps."""
    goals: list[Record] = []
    ours, theirs = memory.get(OURS), memory.get(TRANSFORMERS)
    if ours is None:
        return goals
    for key, frozen in (("saved", False), ("saved_frozen", True)):
        limits = [("of the formula", case.saved_bytes(frozen), 1.0)]
        if theirs and case.shape.name == "qwen3":
            limits.append((f"of {TRANSFORMERS}'s", theirs[key], 1 / 3))
        for unit, other, most in limits:
            value = ours[key] / other
            verdict = "target met" if value <= most else "missed"
            goals.append({"of": f"{key} bytes", "unit": unit, "must": most, "target": most, "value": value, "verdict": verdict})
    return goals


# ---- files
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

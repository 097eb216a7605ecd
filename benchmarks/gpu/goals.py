"""The goals, and what follows from the times of a case: rates, ratios, shares of the floor, verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.cases import CUBLAS, LIGER, MODES, OURS, SONICMOE, TRANSFORMERS, Case, Record


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

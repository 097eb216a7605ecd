"""What is timed, under which names, and its FLOPs, bytes and floor.

S = T K rows, b bytes per element, `hit` experts with tokens. FLOPs count no padding; a floor is the larger of FLOPs over the rate of
a dense product and bytes over the bandwidth, both as measured on an H200. Bytes are read once and written once:
forward-inference 3bHI hit + 2bTH + bS(2I + 2H); forward-training + 2bSI; backward-full 3bHI (hit + E) + 4bTH + bS(10I + 2H);
backward-frozen 3bHI hit + 2bTH + bS(6I + 2H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import Shape

MODES = ("forward-inference", "forward-training", "backward-full", "backward-frozen")
FLOPS_PER_SECOND, BYTES_PER_SECOND = 790e12, 4.3e12  # H200: bf16 product of random data; copy, counting reads and writes
OURS, CUBLAS = "moe_ext", "cuBLAS, same FLOPs"
GROUPED_MM, TRANSFORMERS, COMPILED = "torch grouped_mm alone", "transformers grouped_mm", "transformers grouped_mm, compiled"
LIGER, SCATTERMOE, SONICMOE = "Liger", "ScatterMoE", "SonicMoE"
#: Words for --peers. Ours and the dense product always run: every other figure is read against them.
PEER_NAMES = {"grouped_mm": GROUPED_MM, "transformers": TRANSFORMERS, "compiled": COMPILED, "liger": LIGER, "scattermoe": SCATTERMOE,
              "sonicmoe": SONICMOE}  # fmt: skip
DEFAULT_SHAPES = (
    *("qwen3", "glm", "olmoe", "gpt_oss", "mixtral", "qwen3_next", "qwen3_large", "deepseek_v3_quarter"),
    *("sonic_7b", "sonic_30b", "sonic_120b"),
)
#: In the order of what matters most, so that a short run has the most useful figures.
DEFAULT_TOKENS = (16384, 1024, 4096, 64, 1, 32768, 8192, 256, 16)
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

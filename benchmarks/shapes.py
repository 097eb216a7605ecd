"""The expert layers that are measured, and their inputs. H hidden size, I intermediate size, E experts, K experts per token.

Sizes are those of published models; every layer is measured as gated silu without biases, whatever the model adds to it.
The sizes are known without torch: benchmarks.gpu.run names them before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    name: str
    H: int
    I: int  # noqa: E741
    E: int
    K: int

    def flops(self, tokens: int, mode: str) -> int:
        """Forward 6 T K H I; a backward adds as much for each operand that needs a gradient: the rows, and the weights."""
        return {"forward": 6, "frozen": 12, "full": 18}[mode] * tokens * self.K * self.H * self.I

    def bytes_read(self, hit: int, dtype: torch.dtype) -> int:
        """The weights of `hit` experts: what a forward has to read at least."""
        return 3 * hit * self.H * self.I * dtype.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3", 2048, 768, 128, 8),  # Qwen3-30B-A3B, the headline
        Shape("glm", 2048, 1536, 64, 4),  # GLM-4.7-Flash: the same arithmetic in half as many experts
        Shape("olmoe", 2048, 1024, 64, 8),  # OLMoE-1B-7B
        Shape("gpt_oss", 2880, 2880, 32, 4),  # gpt-oss-20b: sizes that are no multiple of 128
        Shape("mixtral", 4096, 14336, 8, 2),  # Mixtral-8x7B
        Shape("mixtral_half", 2048, 7168, 8, 2),  # the same proportions, a quarter of the weights
        Shape("qwen3_next", 2048, 512, 512, 10),  # Qwen3-Next-80B: many small experts
        Shape("qwen3_large", 4096, 1536, 128, 8),  # Qwen3-235B-A22B
        Shape("deepseek_v3_quarter", 7168, 2048, 64, 8),  # DeepSeek-V3 on one of four ranks
        Shape("sonic_7b", 1536, 256, 128, 8),  # SonicMoE's published shapes
        Shape("sonic_30b", 4096, 256, 256, 16),
        Shape("sonic_120b", 4096, 1024, 128, 8),
        Shape("small", 512, 256, 32, 4),  # fits the caches: overhead
        Shape("tiny", 64, 32, 8, 2),  # for trying the benchmark itself
    )
}

ROUTINGS = ("uniform", "zipf", "one")


def routing(shape: Shape, tokens: int, kind: str = "uniform", draw: int = 0) -> tuple[Tensor, Tensor]:
    """`top_k_index [T,K]` int64 without repeats in a row, and `top_k_weights [T,K]` float32 that sum to 1; another one for each draw.

    uniform: every expert equally likely; zipf: expert e with weight 1/(e+1); one: all tokens to the same K experts.
    """
    import torch

    generator = torch.Generator().manual_seed(tokens + (draw << 32))
    likelihood = torch.ones(shape.E)
    if kind == "zipf":
        likelihood = 1 / torch.arange(1, shape.E + 1)
    if kind == "one":
        index = torch.arange(shape.K).expand(tokens, shape.K).contiguous()
    else:
        index = torch.multinomial(likelihood.expand(tokens, shape.E), shape.K, generator=generator)
    return index, torch.rand(tokens, shape.K, generator=generator).add(0.1).softmax(-1)

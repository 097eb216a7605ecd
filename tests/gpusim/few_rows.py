"""Cases of the op table with few rows per expert, and operands that 16-byte loads can read: what the CUDA library has a kernel for.

On average at most 8 rows per expert, or 16 in all. Tails in each direction: k not in 32s or 256s, outputs not in 32s or 64s,
experts without rows, with more than a tile of 16, and rows of dropped slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_ext._needs import Needs
from tests.helpers.op_table import GPT_OSS, OPS, Build, Case, Inputs, Maker, Op, backward_of, layer, listed, mm_case

FROZEN = Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS
SMALL = {"T": 12, "K": 2, "E": 6, "H": 40, "I": 24}

FEW_ROWS: dict[str, dict[str, Build]] = {
    "grouped_mm": {
        "few": mm_case("grouped_mm", T=8, inputs=64, outputs=32),
        "few_tails_bias": mm_case("grouped_mm", T=9, inputs=40, outputs=37, bias=True),
        "few_transposed_bias": mm_case("grouped_mm", T=9, inputs=40, outputs=72, transposed=True, bias=True),
        "few_long": mm_case("grouped_mm", T=12, E=3, inputs=1288, outputs=40, ids="random"),
        "few_long_transposed": mm_case("grouped_mm", T=12, E=3, inputs=1288, outputs=72, transposed=True, ids="random"),
        "few_one_expert": mm_case("grouped_mm", T=20, K=2, E=5, inputs=48, outputs=40, ids="one"),
        "few_rows_than_experts": mm_case("grouped_mm", T=9, K=4, E=130, inputs=24, outputs=24),
        "few_empty_experts": mm_case("grouped_mm", T=20, K=3, E=10, inputs=24, outputs=24, ids="sparse"),
        "few_many_outputs": mm_case("grouped_mm", T=30, K=2, E=8, inputs=40, outputs=650, bias=True),
        "few_many_outputs_transposed": mm_case("grouped_mm", T=30, K=2, E=8, inputs=40, outputs=904, transposed=True),
    },
    "grouped_mm.list": {
        "few_bias": mm_case("grouped_mm.list", T=9, inputs=40, outputs=37, bias=True),
        "few_transposed": mm_case("grouped_mm.list", T=9, inputs=40, outputs=40, transposed=True),
    },
    "grouped_forward": {
        "few": layer(**SMALL),
        "few_single_token": layer(T=1, K=4, E=8, H=264, I=40),
        "few_bias_dropped": layer(**SMALL, bias=True, ids="dropped"),
        "few_interleaved_relu2": layer(**SMALL, activation="relu2", interleaved=True, bias=True),
        "few_transposed_gelu": layer(**SMALL, activation="gelu", transposed=True, bias=True, ids="dropped"),
        "few_gpt_oss": layer(**SMALL, **GPT_OSS),
        "few_gpt_oss_layout_tail": layer(T=12, K=2, E=6, H=40, I=36, **GPT_OSS),
        "few_gelu_tanh_one_expert": layer(T=15, K=2, E=6, H=296, I=64, activation="gelu_tanh", ids="one"),
        "few_clamped_relu": layer(**SMALL, activation="relu", limit=0.5),
        "few_clamped_silu": layer(**SMALL, limit=0.5, int_dtype=torch.int32),
        "few_ungated": layer(**SMALL, activation="relu2", gated=False, bias=True, ids="dropped"),
        "few_expanded": layer(**SMALL, expanded=True),
        "few_wide": layer(T=30, K=2, E=8, H=40, I=648, bias=True, ids="dropped"),
        "few_wide_interleaved": layer(T=30, K=2, E=8, H=40, I=648, interleaved=True),
        "few_wide_transposed": layer(T=30, K=2, E=8, H=40, I=648, transposed=True, ids="dropped"),
        "few_wide_gpt_oss": layer(T=30, K=2, E=8, H=40, I=648, **GPT_OSS),
        "few_experts_many": layer(T=5, K=4, E=130, H=64, I=40, ids="all"),
    },
    "grouped_forward.list": {"few_bias": listed(layer(**SMALL, bias=True)), "few_dropped": listed(layer(**SMALL, ids="dropped"))},
    "_grouped_forward_train": {"few": layer(**SMALL, bias=True, ids="dropped"), "few_gpt_oss": layer(**SMALL, **GPT_OSS)},
    "_grouped_forward_train.list": {"few": listed(layer(**SMALL, bias=True, ids="dropped"))},
    "_grouped_backward": {"few": backward_of(layer(**SMALL, bias=True, ids="dropped"), FROZEN)},
    "_grouped_backward.list": {"few": backward_of(layer(**SMALL, bias=True, ids="dropped"), FROZEN, is_list=True)},
}  # fmt: skip


class FewRowsCase(Case):
    @property
    def entry(self) -> Op:
        """Without gradients: most of their work is not these kernels', and the backward ops have cases of their own."""
        return replace(OPS[self.op], differentiable=())

    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        return FEW_ROWS[self.op][self.label](Maker(dtype, f"{self}/{draw}", integers))


FEW_ROWS_CASES = [FewRowsCase(op, label) for op, labels in FEW_ROWS.items() for label in labels]

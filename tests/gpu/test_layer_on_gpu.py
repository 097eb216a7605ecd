"""The expert layer at a real model's size: every kind of routing, result and all gradients by the error rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.on_gpu import KIND, QWEN3, ROUTINGS, TRIAL, UNEVEN, Layer, Size, check, needs_gpu, tokens
from tests.helpers.error_rule import check_error_rule
from tests.helpers.op_table import Build, Case, Inputs, Maker, listed
from tests.helpers.op_table import layer as layer_case

pytestmark = needs_gpu


@pytest.mark.parametrize("T", tokens(1, 16, 64, 256, 1024, 4096))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_at_a_real_size(routing: str, T: int) -> None:
    layer = Layer.draw(QWEN3, T, routing, torch.bfloat16)
    check(layer, routing)


@pytest.mark.parametrize("T", tokens(1, 300))
@pytest.mark.parametrize("routing", ["uniform", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [QWEN3, UNEVEN], ids=["qwen3", "uneven"])
def test_other_dtypes_and_sizes(size: Size, dtype: torch.dtype, routing: str, T: int) -> None:
    layer = Layer.draw(size, T, routing, dtype)
    check(layer, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_sizes_that_are_no_multiple_of_a_tile(routing: str) -> None:
    layer = Layer.draw(UNEVEN, tokens(777)[0], routing, torch.bfloat16)
    check(layer, routing)


@pytest.mark.parametrize("T", tokens(16, 1024, 4096))
def test_recomputed_pre_activations(T: int) -> None:
    check(replace(Layer.draw(QWEN3, T, "dropped", torch.bfloat16), recompute=True), "dropped")


@pytest.mark.parametrize("routing", ["one", "empty", "dropped"])
def test_experts_without_tokens_have_a_gradient_of_exact_zeros(routing: str) -> None:
    layer = Layer.draw(QWEN3, tokens(256)[0], routing, torch.bfloat16)
    counts = torch.bincount(layer.index[(layer.index >= 0) & (layer.index < QWEN3.E)], minlength=QWEN3.E)
    if routing == "empty" and not TRIAL:
        assert (counts == 0).sum() >= QWEN3.E / 10
    *_, gate_up, down = layer.results()
    for e in (counts == 0).nonzero().flatten().tolist():
        assert not gate_up[e].any() and not down[e].any(), e


# Every layout at sizes that fill tiles and leave tails, through the op table's own check.
WIDE = {"T": 20, "K": 2, "E": 4, "H": 40, "I": 24} if TRIAL else {"T": 300, "K": 4, "E": 9, "H": 264, "I": 200}
LAYOUTS: dict[str, Build] = {
    "stacked": layer_case(**WIDE),
    "bias": layer_case(**WIDE, bias=True, ids="dropped"),
    "transposed": layer_case(**WIDE, transposed=True),
    "transposed_bias": layer_case(**WIDE, transposed=True, bias=True, ids="sparse"),
    "interleaved": layer_case(**WIDE, interleaved=True),
    "gpt_oss": layer_case(**WIDE, activation="swigluoai", alpha=1.702, limit=7.0, transposed=True, interleaved=True, bias=True),
    "ungated": layer_case(**WIDE, activation="relu2", gated=False),
    "strided": layer_case(**WIDE, bias=True, strided=True),
    "odd": layer_case(**(WIDE | {"H": 37, "I": 21}), ids="dropped"),
}


# As many rows per expert as the largest tiles take.
MANY = WIDE | {"T": 1200}
if not TRIAL:
    LAYOUTS["many_rows"] = layer_case(**MANY)
    LAYOUTS["many_rows_transposed"] = layer_case(**MANY, transposed=True, bias=True, ids="dropped")
    LAYOUTS["many_rows_interleaved"] = layer_case(**MANY, interleaved=True)
    LAYOUTS["many_rows_gpt_oss"] = layer_case(
        **MANY, activation="swigluoai", alpha=1.702, limit=7.0, transposed=True, interleaved=True, bias=True
    )


class Layout(Case):
    def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
        return LAYOUTS[self.label](Maker(dtype, f"{self}/{draw}", integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    check_error_rule(Layout("grouped_forward", layout), dtype, KIND)


@pytest.mark.parametrize("layout", ["stacked", "bias", "ungated", *([] if TRIAL else ["many_rows"])])
def test_every_layout_as_a_list(layout: str) -> None:
    class Listed(Layout):
        def inputs(self, dtype: torch.dtype, integers: bool = False, draw: int = 0) -> Inputs:
            return listed(LAYOUTS[self.label])(Maker(dtype, f"{self}/{draw}", integers))

    check_error_rule(Listed("grouped_forward.list", layout), torch.bfloat16, KIND)

"""Models loaded in 4 bit: a ModuleList of experts is enabled and computes the same, stacked experts are said to be what they are.

Tests are called by the traps they are about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.integrations.run import bitsandbytes as ours
from moe_ext.testing import assert_accurate
from tests.helpers.models import build, logits_and_gradients, needs_tf4, needs_tf5, tokens, transformers
from tests.integrations.quantized import Linear4bit, check, dense, exact_copy, pack_for_cpu, quantize_linears, read

PROJECTIONS = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def load_in_4bit(folder: Path, model: Any, **options: Any) -> Any:
    """`model`, saved and loaded again by transformers with bitsandbytes."""
    model.save_pretrained(folder)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    return load(folder, quantization_config=config, dtype=model.dtype)


def load(folder: Path, **options: Any) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)
    for m in loaded.modules():
        if ours.is_quantized(m):
            m.support_avx512bf16_for_cpu = False  # these sizes its kernel for some processors cannot run in evaluation
    return loaded


def blocks(model: Any) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m._modules.get("experts"), nn.ModuleList)]


def assert_same(new: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Logits, routers, and all else that is not packed as one vector, each part by its size: a norm alone has few numbers."""
    names = [n for n in new if new[n].is_floating_point()]
    alone = [n for n in names if n == "logits" or ".gate." in n]
    rest = [n for n in names if n not in alone]
    assert len(alone) == 2 and len(rest) > 3
    for name in alone:
        assert_accurate(new[name], plain[name], truth[name], name)
    others = (torch.cat([values[n].flatten() / truth[n].norm().to(values[n].dtype) for n in rest]) for values in (new, plain, truth))
    assert_accurate(*others, "all other gradients")


@pytest.mark.tf4
@needs_tf4
@pytest.mark.parametrize("compute", [None, torch.float32], ids=str)
@pytest.mark.parametrize("family", PROJECTIONS)
def test_a_4bit_model_is_enabled_and_computes_the_same(family: str, compute: torch.dtype | None) -> None:
    """Logits and the gradients of everything that is not in 4 bit (QLoRA's frozen base), in training; then as it was before."""
    model = quantize_linears(build(family), compute, quant_type="nf4").train()
    ids = tokens()
    exact = exact_copy(model).train()
    plain, truth = logits_and_gradients(model, ids), logits_and_gradients(exact, ids)
    report = moe_ext.enable(model, strict=True)
    assert report.enabled_count == len(blocks(model)) == 2
    assert_same(logits_and_gradients(model, ids), plain, truth)
    moe_ext.disable(model)
    again = logits_and_gradients(model, ids)
    assert all(torch.equal(again[n], plain[n]) for n in plain)


@pytest.mark.tf4
@needs_tf4
@pytest.mark.parametrize("packed", [False, True])
def test_T66_T67_the_layout_for_some_cpus_stands_against_nothing(packed: bool) -> None:
    """Neither does a proof bring it about, nor does a model that has it lose its gradients."""
    model = quantize_linears(build("qwen3_moe", hidden_size=64, moe_intermediate_size=64), compress_statistics=False)
    experts = [m for block in blocks(model) for m in block.experts.modules() if ours.is_quantized(m)]
    for m in experts:
        m.support_avx512bf16_for_cpu = True
        if packed:
            pack_for_cpu(m)
    with ours.weights_kept(model.train()):
        plain, truth = logits_and_gradients(model, tokens()), logits_and_gradients(exact_copy(model), tokens())
        assert moe_ext.enable(model, strict=True).enabled_count == 2
    states = [m.weight.quant_state.__dict__.get("packing_format_for_cpu", False) for m in experts]
    assert states == [packed] * len(experts) and not any(m.compute_type_is_set for m in experts)
    assert_same(logits_and_gradients(model, tokens()), plain, truth)


@pytest.mark.tf4
@needs_tf4
@pytest.mark.parametrize("family", PROJECTIONS)
def test_T65_T72_what_transformers_loads_can_be_read(family: str, tmp_path: Path) -> None:
    """Quantized while loading, and from a checkpoint that is quantized already."""
    loaded = load_in_4bit(tmp_path / "dense", build(family), bnb_4bit_compute_dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    for block, twin in zip(blocks(loaded), blocks(again), strict=True):
        for name in PROJECTIONS[family]:
            linears, others = ([getattr(e, name) for e in b.experts] for b in (block, twin))
            assert all(type(m) is Linear4bit for m in linears) and read(linears).compute_dtype == torch.float32
            assert all(torch.equal(read(others)[e], dense(m)) for e, m in enumerate(linears))
            check(nn.ModuleList(linears[:5]))
            check(nn.ModuleList(others[:5]))
    assert ours.stacked_note(loaded, blocks(loaded)[0]) is None


@needs_tf5
def test_T60_stacked_experts_of_a_4bit_load_are_reported(tmp_path: Path) -> None:
    plain = build("qwen3_moe", torch.bfloat16)
    loaded = load_in_4bit(tmp_path, plain)
    experts = loaded.model.layers[0].mlp.experts
    size = (8 * 48 * 32 + 8 * 32 * 24) * 2 / 1e6
    assert ours.stacked_note(loaded, experts) == (
        f"loaded in 4 bit, but its experts are stacked parameters, which bitsandbytes leaves in bfloat16: {size:.2f} MB"
    )
    assert ours.stacked_note(loaded, loaded.model.layers[0].self_attn) is None
    assert ours.stacked_note(plain, plain.model.layers[0].mlp.experts) is None
    assert moe_ext.enable(loaded, strict=True).enabled_count == 2


@needs_tf5
def test_T71_stacks_behind_a_parametrization_are_reported_and_run() -> None:
    """Every access dequantizes all of it; during a forward only the first, which transformers' own experts pay as well."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model, exact, ids = build("qwen3_moe"), build("qwen3_moe"), tokens()
    exact.set_experts_implementation("eager")
    for layer, twin in zip(model.model.layers, exact.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
            setattr(twin.mlp.experts, name, nn.Parameter(getattr(layer.mlp.experts, name), requires_grad=False))
    experts = model.model.layers[0].mlp.experts
    size = (8 * 48 * 32 + 8 * 32 * 24) * 4 / 1e6
    assert ours.stacked_note(model, experts) == (
        f"its experts are 4-bit stacks of bitsandbytes, which are dequantized whole at each forward: {size:.2f} MB"
    )
    plain, truth = logits_and_gradients(model, ids), logits_and_gradients(exact.double(), ids)
    assert moe_ext.enable(model, strict=True).enabled_count == 2
    assert_same(logits_and_gradients(model, ids), plain, truth)

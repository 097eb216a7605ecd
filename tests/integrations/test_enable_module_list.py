"""Blocks of transformers 4.57 with one module per expert: what they compute, what they return, and when they are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.integrations.run.listed import ListedReader
from tests.helpers.models import BOTH, build, enable_within_the_error_rule, expert_blocks, logits_and_gradients, needs_tf4, tokens

pytestmark = [pytest.mark.tf4, needs_tf4]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", BOTH)
def test_whole_model_obeys_the_error_rule_and_comes_back(family: str, training: bool) -> None:
    model = build(family).train(training)
    ids = tokens()
    report, plain = enable_within_the_error_rule(model, ids)
    assert report.enabled_count == 2 and {b.path for b in report.blocks} == {"fused"}
    assert moe_ext.disable(model) == 2
    again = logits_and_gradients(model, ids)
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert not any("forward" in block.__dict__ for block in expert_blocks(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", BOTH)
def test_every_dtype_is_proven(family: str, dtype: torch.dtype) -> None:
    assert moe_ext.enable(build(family, dtype), strict=True).enabled_count == 2


def test_weights_are_used_where_they_are() -> None:
    block = expert_blocks(build("qwen3_moe"))[0]
    weights = ListedReader("experts", ("gate_proj", "up_proj", "down_proj")).read(block)
    assert weights.gate_proj[3] is block.experts[3].gate_proj.weight
    assert weights.down_proj[7] is block.experts[7].down_proj.weight
    assert weights.up_bias is None


def test_biases_are_applied() -> None:
    model = build("qwen3_moe")
    for block in expert_blocks(model):
        for expert in block.experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                old = getattr(expert, name)
                new = nn.Linear(old.in_features, old.out_features, bias=True)
                nn.init.normal_(new.bias)
                setattr(expert, name, new)
    ids = tokens()
    enable_within_the_error_rule(model, ids)


def test_a_forward_that_leans_on_its_parent_class_is_left_alone() -> None:
    """What `super()` refers to cannot be copied with the code of a method."""
    model = build("mixtral")
    block = expert_blocks(model)[0]
    kind = type(block)

    class Child(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor):
            out, logits = super().forward(hidden_states)
            return out * 1.001, logits

    block.__class__ = Child
    report = moe_ext.enable(model)
    assert [b.enabled for b in report.blocks] == [False, True]
    assert "its forward refers to variables around it (__class__)" in report.blocks[0].reason


def test_more_arguments_and_the_environment_switch_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    block = expert_blocks(build("olmoe"))[0]
    x = torch.randn(2, 3, 32)
    before = block(x)[0]
    moe_ext.enable(block)
    with pytest.raises(TypeError):
        block(x, 1)
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    assert torch.equal(block(x)[0], before)

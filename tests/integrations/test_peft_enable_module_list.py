"""Whole models of transformers 4 with LoRA of PEFT on their experts: enabled before or after, trained, merged, saved.

Single projections, and what is refused, are in test_peft_module_list.py. The number of a trap is in the name of its test.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moe_ext
from moe_ext.testing import assert_accurate
from tests.helpers.models import build, in_float64, logits_and_gradients, needs_tf4, tokens
from tests.integrations.adapters import PROJECTIONS, activate, assert_all_accurate, attach, peft

pytestmark = [pytest.mark.tf4, needs_tf4]

EXPERT_LAYERS = {"qwen3_moe": PROJECTIONS, "olmoe": PROJECTIONS, "mixtral": ("w1", "w2", "w3")}


@contextlib.contextmanager
def never_one_by_one() -> Iterator[None]:
    """Fails where a layer of PEFT's is called."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("PEFT's own layer was called")

        patch.setattr(peft.tuners.lora.layer.Linear, "forward", refuse)
        yield


def check_whole(model: Any) -> None:
    """Logits and all gradients of an enabled model against PEFT's own code."""
    with never_one_by_one():
        new = logits_and_gradients(model, tokens())
    moe_ext.disable(model)
    assert_all_accurate(new, logits_and_gradients(model, tokens()), logits_and_gradients(in_float64(model), tokens()))
    moe_ext.enable(model, strict=True)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", EXPERT_LAYERS)
def test_T73_attached_before_or_after_enable(family: str, order: str) -> None:
    model = build(family)
    names = list(EXPERT_LAYERS[family])
    if order == "before":
        model = attach(model, target_modules=names)
    moe_ext.enable(model, strict=True)
    if order == "after":
        model = attach(model, target_modules=names)
    check_whole(model)
    model = attach(model, "other", r=3, lora_alpha=4, target_modules=names[1:])
    check_whole(activate(model, "default", "other"))


def test_T85_adapters_on_attention_and_router_stay_pefts() -> None:
    model = attach(build("qwen3_moe"), target_modules=[*PROJECTIONS, "gate", "q_proj"])
    moe_ext.enable(model, strict=True)
    new = logits_and_gradients(model, tokens())
    moe_ext.disable(model)
    assert_all_accurate(new, logits_and_gradients(model, tokens()), logits_and_gradients(in_float64(model), tokens()))
    assert all(new[name].any() for name in new if "mlp.gate.lora" in name or "q_proj.lora" in name)


def test_T78_dropout_runs_pefts_own_layers_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen3_moe")
    moe_ext.enable(model, strict=True)
    model = attach(model, target_modules=list(PROJECTIONS), lora_dropout=0.25)
    with never_one_by_one():
        model.eval()(tokens())
    model.train()
    with caplog.at_level("WARNING", "moe_ext"):
        torch.manual_seed(0)
        out = model(tokens()).logits
    assert "dropout on its adapter 'default'" in caplog.text
    moe_ext.disable(model)
    torch.manual_seed(0)
    assert torch.equal(model(tokens()).logits, out)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = attach(build("qwen3_moe"), target_modules=list(PROJECTIONS)).train()
    moe_ext.enable(model, strict=True)
    plain = logits_and_gradients(model, tokens())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()
    with never_one_by_one():
        checkpointed = logits_and_gradients(model, tokens())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_T77_T98_merging_saving_and_loading(tmp_path) -> None:
    model = attach(build("qwen3_moe"), target_modules=list(PROJECTIONS))
    moe_ext.enable(model, strict=True)
    expected, truth = model(tokens()).logits, in_float64(model)(tokens()).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    moe_ext.enable(again, strict=True)
    with never_one_by_one():
        assert torch.equal(again(tokens()).logits, expected)
        assert torch.equal(copy.deepcopy(again)(tokens()).logits, expected)
        model.base_model.merge_adapter()
        assert_accurate(model(tokens()).logits, expected, truth)
        model.base_model.unmerge_adapter()
        with model.disable_adapter():
            base = model(tokens()).logits
    unloaded = model.unload()
    assert torch.equal(unloaded(tokens()).logits, base) and moe_ext.disable(unloaded) == 2

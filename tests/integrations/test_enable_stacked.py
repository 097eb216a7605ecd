"""Stacked experts of transformers 5: every layout and gate, in training and evaluation, and the way back."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

import moe_ext
from moe_ext import reference
from moe_ext.integrations.run import decorated
from moe_ext.integrations.usable import Refused, require_usable
from moe_ext.testing import assert_accurate
from tests.helpers.models import (
    EXPERTS,
    Holder,
    build,
    build_experts,
    enable_within_the_error_rule,
    logits_and_gradients,
    needs_tf5,
    routing,
    tokens,
)

pytestmark = needs_tf5

PATHS = {"beam": "composed", "muse_spark": "composed"}
FORMULAS = {
    "gpt_oss": {"activation": "swigluoai", "alpha": 1.702, "limit": 1.0, "transposed": True, "interleaved": True},
    "deepseek_v4": {"activation": "silu", "limit": 1.0},
    "nemotron_h": {"activation": "relu2", "gated": False},
    "gemma4": {"activation": "gelu_tanh"},
    "aria": {"activation": "silu", "transposed": True},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_formula_is_recognised(family: str) -> None:
    formula = decorated.formula_of(build_experts(family))
    assert formula.path == PATHS.get(family, "fused")
    for name, value in FORMULAS.get(family, {"activation": "silu", "gated": True, "limit": None, "transposed": False}).items():
        assert getattr(formula.spec, name) == value, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_obey_the_error_rule(family: str, dtype: torch.dtype, training: bool) -> None:
    module = build_experts(family, dtype).train(training)
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    index, w = routing(24, 5)
    direction = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = module(x, index, w)
    report = moe_ext.enable(Holder(module), strict=True)
    assert report.enabled_count == 1 and report.blocks[0].path == PATHS.get(family, "fused")
    weights, spec = decorated.read_weights(module), decorated.formula_of(module).resolve(module)

    def measure(compute, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).clone().requires_grad_() for t in (x, w.to(torch.float64 if dtype == torch.float64 else torch.float32))]
        out = compute(inputs[0], index, inputs[1])
        used = [*inputs, *(p for p in weights.tensors())]
        return [out, *torch.autograd.grad(out, used, direction.to(dtype))]

    new = measure(module, dtype)
    plain = measure(lambda *args: reference.grouped_experts(*args, weights, spec), dtype)
    truth = measure(lambda *args: reference.grouped_experts(*args, weights, spec), torch.float64)
    names = ["output", "hidden_states", "top_k_weights", *(f"weight {i}" for i in range(len(weights.tensors())))]
    for name, a, b, c in zip(names, new, plain, truth, strict=True):
        assert_accurate(a, b, c, name)
    assert moe_ext.disable(Holder(module)) == 1
    assert torch.equal(module(x, index, w), before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"])
def test_whole_model_obeys_the_error_rule_and_comes_back(family: str, training: bool) -> None:
    model = build(family).train(training)
    ids = tokens()
    _, plain = enable_within_the_error_rule(model, ids)
    moe_ext.disable(model)
    again = logits_and_gradients(model, ids)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("previous", ["eager", "batched_mm", "grouped_mm"])
def test_disable_restores_the_previous_implementation(previous: str) -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation(previous)
    moe_ext.enable(model)
    assert model.get_experts_implementation() == {"": "moe_ext"}
    assert moe_ext.disable(model) == 2
    assert model.get_experts_implementation() == {"": previous}
    assert moe_ext.disable(model) == 0


def test_register_then_choose_by_name(caplog: pytest.LogCaptureFixture) -> None:
    moe_ext.register()
    moe_ext.register()
    model = build("olmoe", experts_implementation="moe_ext")
    enabled = build("olmoe")
    moe_ext.enable(enabled)
    with caplog.at_level(logging.WARNING, "moe_ext"):
        assert torch.equal(model(tokens()).logits, enabled(tokens()).logits)
    report = moe_ext.explain(model)
    assert report.enabled_count == 2 and not any(b.figures for b in report.blocks)


def test_fallback_says_why_and_gives_the_previous_result() -> None:
    """A weight that is elsewhere or of another kind than the input is left to the implementation from before."""
    module = build_experts("mixtral")
    index, w = routing(6, 5)
    x = torch.randn(6, 32)
    before = module(x, index, w)
    moe_ext.enable(Holder(module))
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("moe_ext").addHandler(handler)
    try:
        decorated.apply(module, decorated.Skipped("eager", "of this test"))
        for _ in range(2):
            assert torch.equal(module(x, index, w), before)
    finally:
        logging.getLogger("moe_ext").removeHandler(handler)
    assert [r.getMessage() for r in records] == ["MixtralExperts runs its own eager implementation: of this test"]


def test_dtensor_and_meta_and_other_dtypes_are_not_touched() -> None:
    weights = decorated.read_weights(build_experts("mixtral"))
    require_usable(weights.tensors(), torch.zeros(1, 32))
    with pytest.raises(Refused, match="float32"):
        require_usable(weights.tensors(), torch.zeros(1, 32, dtype=torch.bfloat16))
    with pytest.raises(Refused, match="meta"):
        require_usable(decorated.read_weights(build_experts("mixtral").to("meta")).tensors(), torch.zeros(1, 32))


def test_autocast_returns_the_dtype_of_the_input() -> None:
    module = build_experts("mixtral")
    index, w = routing(6, 5)
    x = torch.randn(6, 32)
    moe_ext.enable(Holder(module))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, index, w)
        plain = decorated.run_implementation(module, "eager", x, index, w)
    assert out.dtype == plain.dtype == torch.float32
    weights, spec = decorated.read_weights(module), decorated.formula_of(module).resolve(module)
    assert_accurate(out, plain, reference.grouped_experts(x.double(), index, w.double(), weights, spec))


def test_own_module_without_pretrained_model() -> None:
    module = build_experts("qwen3_moe", implementation="grouped_mm")
    report = moe_ext.enable(Holder(module))
    assert report.enabled_count == 1 and module.config._experts_implementation == "moe_ext"
    moe_ext.disable(Holder(module))
    assert module.config._experts_implementation == "grouped_mm"


def test_skipped_neighbour_keeps_its_implementation() -> None:
    """Two experts on one config, one of them not provable: it goes on with what was configured, and is reported."""
    model = build("qwen3_moe")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    with torch.no_grad():
        second.down_proj.fill_(float("nan"))
    before = second(torch.ones(3, 32), *routing(3, 8))
    report = moe_ext.enable(model)
    assert [b.enabled for b in report.blocks] == [True, False]
    assert "not finite" in report.blocks[1].reason and report.blocks[1].path == "original"
    assert decorated.is_enabled(first) and not decorated.is_enabled(second)
    assert (
        torch.equal(
            second(torch.ones(3, 32), *routing(3, 8)),
            before,
        )
        or before.isnan().all()
    )
    with pytest.raises(moe_ext.EnableError, match="not finite") as error:
        moe_ext.disable(model)
        moe_ext.enable(model, strict=True)
    assert len(error.value.report.skipped) == 1
    assert model.get_experts_implementation() == {"": "grouped_mm"} and decorated.plan_of(first) is None


def test_compiled_model_has_one_graph_and_the_same_values() -> None:
    for family in ("qwen3_moe", "beam"):
        module = build_experts(family)
        moe_ext.enable(Holder(module))
        index, w = routing(6, 5)
        x = torch.randn(6, 32)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, index, w), module(x, index, w))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = build("qwen3_moe").train()
    moe_ext.enable(model)
    plain = logits_and_gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with contextlib.suppress(AttributeError):
        model.enable_input_require_grads()
    checkpointed = logits_and_gradients(model, tokens())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)

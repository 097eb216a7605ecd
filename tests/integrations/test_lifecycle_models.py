"""An enabled model through what is done with models: loading, training by a Trainer, compilation, generation, being part of another.

`moe_ext.auto` is tested here; traps T89, T91, T96. What happens to weights and modules between two calls is in test_placement.py.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext._auto import auto
from moe_ext.integrations.run import decorated, patch
from moe_ext.testing import assert_accurate
from tests.helpers.models import BOTH, build, enable_within_the_error_rule, expert_blocks, in_float64, logits_and_gradients, tokens

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'moe-ext[hf]')")

pytestmark = pytest.mark.tf4

BLOCKS = 2


def is_enabled(module: nn.Module) -> bool:
    return decorated.is_enabled(module) if decorated.plan_of(module) else patch.is_enabled(module)


def enabled_blocks(model: nn.Module) -> int:
    return sum(map(is_enabled, expert_blocks(model)))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# ------------------------------------------------------------------------------------------------------------------------- loading
@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def test_auto_enables_what_a_loader_returns(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained
    plain = original(checkpoint)
    attributes, keys = set(vars(plain)), list(plain.state_dict())
    reports: list[moe_ext.EnableReport] = []
    load = auto(original, strict=True, on_report=reports.append)
    with caplog.at_level(logging.INFO, logger="moe_ext"):
        model = load(checkpoint, torch_dtype=torch.float32)
    assert enabled_blocks(model) == BLOCKS == reports[0].enabled_count
    assert "2 of 2 expert blocks enabled" in caplog.text
    assert_accurate(logits(model), logits(plain), logits(in_float64(plain)))
    assert set(vars(model)) == attributes and list(model.state_dict()) == keys
    assert inspect.signature(load) == inspect.signature(original) and load.__doc__ == original.__doc__
    assert enabled_blocks(original(checkpoint)) == 0  # the loader itself is as it was


def test_T89_auto_of_auto_is_one_auto(checkpoint: Path) -> None:
    first: list[Any] = []
    second: list[Any] = []
    load = auto(auto(transformers.AutoModelForCausalLM.from_pretrained, on_report=first.append), on_report=second.append)
    assert enabled_blocks(load(checkpoint)) == BLOCKS
    assert (len(first), len(second)) == (0, 1)


def test_auto_passes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = moe_ext.enable
    monkeypatch.setattr(sys.modules["moe_ext._auto"], "enable", lambda model, **options: seen.append(options) or original(model, **options))
    auto(lambda: build("olmoe"), strict=True, prove=False)()
    auto(lambda: build("olmoe"))()
    assert seen == [{"strict": True, "prove": False}, {"strict": False, "prove": True}]


def test_auto_of_a_loader_that_returns_more_than_a_model() -> None:
    reports: list[Any] = []
    pair = auto(lambda: (build("mixtral"), "a tokenizer"), on_report=reports.append)()
    assert enabled_blocks(pair[0]) == BLOCKS and pair[1] == "a tokenizer"
    both = auto(lambda: {"student": build("mixtral"), "teacher": build("olmoe")}, on_report=reports.append)()
    assert [enabled_blocks(m) for m in both.values()] == [BLOCKS, BLOCKS] and len(reports) == 3
    with pytest.raises(TypeError, match="wraps loaders of models, but .* returned a str without any nn.Module"):
        auto(lambda: "a path")()


def test_auto_of_a_model_without_experts(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[moe_ext.EnableReport] = []
    model = auto(lambda: build("llama"), on_report=reports.append)()
    assert "LlamaForCausalLM has no experts that moe_ext can compute" in caplog.text
    assert reports[0].enabled_count == 0 and "has no experts" in str(reports[0]) and logits(model).isfinite().all()
    with pytest.raises(moe_ext.NoExpertsFound):
        auto(lambda: build("llama"), strict=True)()


def test_auto_of_a_model_on_meta(caplog: pytest.LogCaptureFixture) -> None:
    model = auto(lambda: build("qwen3_moe").to("meta"))()
    assert enabled_blocks(model) == 0 and "its weights are on the meta device" in caplog.text
    with pytest.raises(moe_ext.EnableError, match="on the meta device"):
        auto(lambda: build("qwen3_moe").to("meta"), strict=True)()


def test_auto_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    reports: list[moe_ext.EnableReport] = []
    for family in ("qwen3_moe", "llama"):
        model = auto(lambda family=family: build(family), strict=True, on_report=reports.append)()
        assert enabled_blocks(model) == 0
    assert all(report.note == "MOE_EXT_DISABLE is set: nothing was enabled" for report in reports)


def test_auto_of_adapters_on_an_enabled_model() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = auto(peft.get_peft_model)(auto(lambda: build("qwen3_moe"))(), config)
    assert isinstance(model, peft.PeftModel) and enabled_blocks(model) == BLOCKS
    frozen = [p for block in expert_blocks(model) for n, p in block.named_parameters() if "gate.weight" not in n]
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert frozen and all(p.grad is None for p in frozen)


# ------------------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["stored", "reentrant", "not reentrant"])
def test_T91_trainer(checkpointing: bool | None, tmp_path: Path) -> None:
    """Three steps change the parameters as they change those of the model as it was; what is saved can be loaded and goes on."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    start = build("qwen3_moe")
    results = {}
    for name in ("new", "plain", "truth"):
        model = in_float64(start) if name == "truth" else copy.deepcopy(start)
        if name == "new":
            moe_ext.enable(model, strict=True)
        losses, before = trained(model, tmp_path / name, checkpointing), dict(start.named_parameters())
        changes = torch.cat([(p.detach() - before[key].to(p.dtype)).flatten() for key, p in model.named_parameters()])
        results[name] = losses, changes.detach()
        if name == "new":
            assert enabled_blocks(model) == BLOCKS
            saved = type(model).from_pretrained(tmp_path / name / "checkpoint-3")
            moe_ext.enable(saved, strict=True)
            assert torch.equal(logits(saved.eval()), logits(model.eval()))
    for i in range(2):
        assert_accurate(*(results[name][i] for name in ("new", "plain", "truth")))


def trained(model: Any, folder: Path, checkpointing: bool | None) -> torch.Tensor:
    """The losses of three steps by the Trainer of transformers."""
    losses: list[torch.Tensor] = []

    class Recording(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            losses.append((out[0] if isinstance(out, tuple) else out).detach())
            return out

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, optim="sgd", max_grad_norm=0, save_steps=3, seed=0,
        report_to=[], use_cpu=True, disable_tqdm=True, gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=None if checkpointing is None else {"use_reentrant": checkpointing},
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=12)]
    Recording(model, arguments, train_dataset=data).train()
    return torch.stack(losses)


@pytest.mark.parametrize("family", BOTH)
def test_T91_gradient_checkpointing_switched_on_and_off(family: str) -> None:
    model = build(family).train()
    moe_ext.enable(model, strict=True)
    plain = logits_and_gradients(model, tokens())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = logits_and_gradients(model, tokens())
        assert all(torch.equal(again[name], plain[name]) for name in plain)
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        again = logits_and_gradients(model, tokens())
        assert all(torch.equal(again[name], plain[name]) for name in plain)


# ------------------------------------------------------------------------------------------------------- compilation and generation
@pytest.mark.parametrize("family", BOTH)
def test_T96_compiled_without_a_graph_break(family: str) -> None:
    """Also where the model's own loop over its experts breaks the graph: the copied method is traced as any other code."""
    from torch._dynamo.testing import CompileCounter

    model = build(family, use_cache=False, num_hidden_layers=1).eval()
    moe_ext.enable(model, strict=True)
    expected = logits(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(logits(compiled), expected)
    assert torch.equal(logits(compiled), expected)
    assert counter.frame_count == 1


def test_T96_compiled_training_is_that_of_eager() -> None:
    model = build("qwen3_moe", use_cache=False, num_hidden_layers=1).train()
    enable_within_the_error_rule(model, tokens())
    eager = logits_and_gradients(model, tokens())
    torch._dynamo.reset()
    compiled = logits_and_gradients(torch.compile(model, backend="aot_eager"), tokens())
    assert all(torch.equal(compiled[f"_orig_mod.{name}" if name != "logits" else name], eager[name]) for name in eager)


def test_T96_a_compiled_model_sees_a_change() -> None:
    model = build("qwen3_moe", use_cache=False, num_hidden_layers=1).eval()
    moe_ext.enable(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled)
    with torch.no_grad():
        for block in expert_blocks(model):
            for p in block.parameters():
                p.mul_(1.25)
    changed = logits(compiled)
    assert torch.equal(changed, logits(model)) and not torch.equal(changed, before)
    moe_ext.disable(model)
    assert torch.equal(logits(compiled), logits(model))


@pytest.mark.parametrize("family", BOTH)
def test_generation_with_a_cache(family: str) -> None:
    model = build(family).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens(5), **options)
    moe_ext.enable(model, strict=True)
    assert torch.equal(model.generate(tokens(5), **options), plain)
    assert torch.equal(model.generate(tokens(5), use_cache=False, **options), plain)


# --------------------------------------------------------------------------------------------------------- parts of a larger whole
def test_two_models_that_share_a_config() -> None:
    first, second = build("qwen3_moe"), build("qwen3_moe")
    second.config = first.config
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    own, truth = logits(second), logits(in_float64(build("qwen3_moe")))
    moe_ext.enable(first, strict=True)
    assert_accurate(logits(second), own, truth)
    moe_ext.enable(second, strict=True)
    both = logits(first), logits(second)
    assert torch.equal(*both)
    moe_ext.disable(first)
    assert_accurate(logits(second), own, truth)
    moe_ext.disable(second)
    assert torch.equal(logits(first), own) and torch.equal(logits(second), own)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = build("qwen3_moe"), build("olmoe")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.student(ids).logits + self.teacher(ids).logits


def test_models_inside_a_larger_module() -> None:
    whole = Pair()
    with torch.no_grad():
        own = whole(tokens())
        report = moe_ext.enable(whole, strict=True)
        assert report.enabled_count == 2 * BLOCKS
        assert {block.module.split(".")[0] for block in report.blocks} == {"student", "teacher"}
        assert not torch.equal(whole(tokens()), own)
        assert moe_ext.disable(whole.teacher) == BLOCKS and enabled_blocks(whole.student) == BLOCKS
        assert moe_ext.disable(whole) == BLOCKS
        assert torch.equal(whole(tokens()), own)


def test_enabling_one_layer_only() -> None:
    model = build("qwen3_moe")
    own, truth = logits(model), logits(in_float64(model))
    assert moe_ext.enable(model.model.layers[1], strict=True).enabled_count == 1
    assert is_enabled(expert_blocks(model)[1])
    assert_accurate(logits(model), own, truth)
    assert moe_ext.enable(model, strict=True).enabled_count == BLOCKS
    assert_accurate(logits(model), own, truth)
    assert moe_ext.disable(model) == BLOCKS and torch.equal(logits(model), own)


def test_enabling_in_several_threads() -> None:
    models = {name: build(name) for name in BOTH}
    own = {name: logits(model) for name, model in models.items()}
    truth = {name: logits(in_float64(model)) for name, model in models.items()}
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(2):
                moe_ext.enable(models[name], strict=True)
                assert_accurate(logits(models[name]), own[name], truth[name], name)
                moe_ext.disable(models[name])
            moe_ext.enable(models[name], strict=True)
        except BaseException as error:  # raised in the thread that is asked
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert [enabled_blocks(model) for model in models.values()] == [BLOCKS] * len(models)

"""LoRA of PEFT on stacked experts (`target_parameters`): run grouped under PEFT's wrappers, attached before or after `enable`.

The number of a trap is in the name of its test. Those without one here:
T75 adapters written with another order of the experts: PEFT reads them as it reads all, and what we read is what PEFT has in memory.
T78, T80 dropout, DoRA and biases: PEFT refuses them on parameters (test_peft_module_list.py has them on linear layers).
T83 adapters of transformers 4 on stacked experts: PEFT turns them into ordinary ones (higher ranks, block-diagonal B) when it loads them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext.integrations.run import decorated
from moe_ext.integrations.run import peft as ours
from moe_ext.testing import assert_accurate
from tests.helpers.models import (
    Holder,
    build,
    build_experts,
    in_float64,
    logits_and_gradients,
    needs_tf5,
    randomise,
    routing,
    tokens,
    transformers,
)
from tests.integrations.adapters import Recorder, activate, assert_all_accurate, attach, exact_copy, outputs_and_gradients, peft

pytestmark = needs_tf5

FAMILIES = {
    "qwen3_moe": ["gate_up_proj", "down_proj"],
    "gpt_oss": ["gate_up_proj", "down_proj"],  # transposed, interleaved, biases
    "nemotron_h": ["up_proj", "down_proj"],  # without gate
    "muse_spark": ["gate_up_proj", "down_proj"],  # a gate of its own: composed without adapters too
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def experts_with_lora(family: str, dtype: torch.dtype = torch.float32, names: list[str] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    held = Holder(build_experts(family, dtype).requires_grad_(False))
    return attach(held, target_modules=[], target_parameters=[f"experts_of_mine.{n}" for n in names or FAMILIES[family]], **options)


def run(model: nn.Module, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    held = next(m for m in model.modules() if isinstance(m, Holder))
    return held.experts_of_mine(x, index, w)


def decorated_experts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]


def wrappers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper)]


def truth_of(model: nn.Module) -> dict[str, Tensor]:
    """Of PEFT's own code in float64: a copy that was never enabled."""
    exact = exact_copy(model)
    moe_ext.disable(exact)
    for experts in decorated_experts(exact):
        experts.config = copy.deepcopy(experts.config)
        experts.config._experts_implementation = "eager"
    return outputs_and_gradients(exact, run, torch.float64)


@contextlib.contextmanager
def never_dense() -> Iterator[None]:
    """Fails where PEFT adds an adapter to a whole stack."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("PEFT added an adapter to the whole stack")

        patch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
        yield


def check(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Enables, and compares with what PEFT's own code computes; afterwards it is enabled."""
    moe_ext.disable(model)
    plain, truth = outputs_and_gradients(model, run, dtype), truth_of(model)
    moe_ext.enable(model, strict=True)
    with never_dense():
        new = outputs_and_gradients(model, run, dtype)
    assert_all_accurate(new, plain, truth)


# --------------------------------------------------------------------------------------------------------------------- computation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_T73_adapters_compute_what_peft_computes(family: str, dtype: torch.dtype) -> None:
    check(experts_with_lora(family, dtype), dtype)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_T74_columns_of_B_run_over_the_experts_first(family: str) -> None:
    """Whole numbers, all different: one transposition of ranks and experts gives other sums."""
    model = experts_with_lora(family, r=3, lora_alpha=3)
    for wrapper in wrappers(model):
        with torch.no_grad():
            for factor in (wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight):
                factor.copy_(torch.arange(factor.numel()).view(factor.shape) % 251)
        adapter, delta = ours._stacked_factors(wrapper, "default", family == "gpt_oss"), wrapper.get_delta_weight("default")
        for e in range(5):
            own = adapter.b[e] @ adapter.a[e] * adapter.scaling
            assert torch.equal(own.T if family == "gpt_oss" else own, delta[e])
        other = wrapper.lora_B["default"].weight.view(-1, 5, 3).permute(1, 0, 2)
        assert not torch.equal(other, adapter.b)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_T52_T53_peft_may_take_rows_for_columns(family: str) -> None:
    """It asks the module for `is_transposed`, and older versions do not even ask."""
    experts = build_experts(family).requires_grad_(False)
    right = experts.is_transposed
    experts.is_transposed = not right
    model = attach(Holder(experts), target_modules=[], target_parameters=["experts_of_mine.down_proj", "experts_of_mine.gate_up_proj"])
    experts.is_transposed = right
    assert all(ours._taken_for_transposed(wrapper) != right for wrapper in wrappers(model))
    check(model)


def second(model: Any, **options: Any) -> Any:
    names = [f"experts_of_mine.{w.parameter_name}" for w in wrappers(model)]
    return attach(model, "other", target_modules=[], target_parameters=names, **{"r": 3, "lora_alpha": 4} | options)


CASES: dict[str, Callable[[], Any]] = {
    "T76_two_active": lambda: activate(second(experts_with_lora("qwen3_moe")), "default", "other"),
    "T76_two_active_transposed": lambda: activate(second(experts_with_lora("gpt_oss")), "default", "other"),
    "T76_the_other_active": lambda: activate(second(experts_with_lora("qwen3_moe")), "other"),
    "T76_one_projection": lambda: experts_with_lora("qwen3_moe", names=["down_proj"]),
    "T76_different_ranks": lambda: experts_with_lora("qwen3_moe", rank_pattern={r"experts_of_mine.down_proj": 7}),
    "T79_rslora": lambda: experts_with_lora("qwen3_moe", use_rslora=True),
    "T82_rank_1": lambda: experts_with_lora("qwen3_moe", r=1, lora_alpha=1),
    "T82_rank_6": lambda: experts_with_lora("qwen3_moe", r=6),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_adapters(case: str) -> None:
    check(CASES[case]())


@pytest.mark.parametrize("cast", [True, False], ids=["float32 factors", "bfloat16 factors"])
def test_T81_factors_of_either_dtype_on_bfloat16_experts(cast: bool) -> None:
    check(experts_with_lora("qwen3_moe", torch.bfloat16, cast=cast), torch.bfloat16)


def test_T29_no_dense_sum_and_no_gradient_that_is_not_needed() -> None:
    model = experts_with_lora("qwen3_moe")
    moe_ext.enable(model, strict=True)
    wrappers(model)[0].lora_A.requires_grad_(False)
    x = torch.randn(96, 32, requires_grad=True)
    with Recorder() as recorder:
        run(model, x, *routing(96, 5)).sum().backward()
    assert not {tuple(shape) for _, shape in recorder.made} & {(5, 48, 32), (5, 32, 24)}, "a stack was made"
    wgrads = [tuple(shape) for op, shape in recorder.made if "wgrad" in op]
    assert sorted(wgrads) == [(5, 4, 32), (5, 32, 4), (5, 48, 4)]
    for path, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, path


# ------------------------------------------------------------------------------------------------------------------------ whole models
def with_lora(model: nn.Module, **options: Any) -> Any:
    return attach(model, target_modules=[], target_parameters=BOTH, **options)


def check_whole(model: Any, ids: Tensor | None = None) -> None:
    """Logits and all gradients of an enabled model against PEFT's own code."""
    ids = tokens() if ids is None else ids
    with never_dense():
        new = logits_and_gradients(model, ids)
    moe_ext.disable(model)
    plain, truth = logits_and_gradients(model, ids), logits_and_gradients(in_float64(model), ids)
    moe_ext.enable(model, strict=True)
    assert_all_accurate(new, plain, truth)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_T73_attached_before_or_after_enable(family: str, order: str) -> None:
    model = build(family)
    if order == "before":
        model = with_lora(model)
        moe_ext.enable(model, strict=True)
    else:
        moe_ext.enable(model, strict=True)
        model = with_lora(model)
    check_whole(model)


def test_T85_adapters_on_attention_and_router_stay_pefts() -> None:
    names = [*BOTH, "mlp.gate.weight"]
    model = attach(build("qwen3_moe"), target_modules=["q_proj", "v_proj"], target_parameters=names)
    moe_ext.enable(model, strict=True)
    ids = tokens()
    new = logits_and_gradients(model, ids)
    moe_ext.disable(model)
    assert_all_accurate(new, logits_and_gradients(model, ids), logits_and_gradients(in_float64(model), ids))
    assert all(new[name].any() for name in new if "gate.lora" in name)


def test_T86_nothing_is_bound_to_a_wrapper_and_names_are_those_of_the_experts() -> None:
    model = with_lora(build("qwen3_moe"))
    before = {wrapper: dict(vars(wrapper)) for wrapper in wrappers(model)}
    classes = [type(m) for m in model.modules()]
    report = moe_ext.enable(model, strict=True)
    assert [b.class_name for b in report.blocks] == ["Qwen3MoeExperts"] * 2
    assert [b.module.split(".base_layer")[0] for b in report.blocks] == [f"base_model.model.model.layers.{i}.mlp.experts" for i in range(2)]
    logits_and_gradients(model, tokens())
    assert {wrapper: dict(vars(wrapper)) for wrapper in wrappers(model)} == before and len(before) == 4
    assert [type(m) for m in model.modules()] == classes
    assert not any("pending" in name for experts in decorated_experts(model) for name in vars(experts))
    moe_ext.disable(model)
    assert {wrapper: dict(vars(wrapper)) for wrapper in wrappers(model)} == before


def test_T55_experts_that_peft_has_parametrized_are_found() -> None:
    """Called while PEFT's own parametrization is on them, as by a callback of the user within a forward."""
    model = with_lora(build("qwen3_moe"))
    outer = wrappers(model)[0]
    with outer._activate_lora(["default"]):
        assert type(outer.get_base_layer()).__name__ == "ParametrizedQwen3MoeExperts"
        assert moe_ext.explain(model).blocks[0].reason is None


def test_T76_T77_T79_the_state_is_read_at_each_call() -> None:
    model = with_lora(build("qwen3_moe"))
    moe_ext.enable(model, strict=True)
    model = attach(model, "other", r=3, target_modules=[], target_parameters=BOTH)
    steps: list[Callable[[], Any]] = [
        lambda: model.set_adapter("other"),
        lambda: activate(model, "default", "other"),
        lambda: wrappers(model)[0].scale_layer(0.5),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model.merge_adapter(["other"]),
        lambda: model.base_model.unmerge_adapter(),
        lambda: wrappers(model)[1].scaling.update(other=torch.tensor(0.7)),
        lambda: model.delete_adapter("default"),
    ]
    seen = []
    for step in steps:
        step()
        with never_dense():
            seen.append(model(tokens()).logits)
        moe_ext.disable(model)
        assert_accurate(seen[-1], model(tokens()).logits, in_float64(model)(tokens()).logits)
        moe_ext.enable(model, strict=True)
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_T77_disabled_while_merged_takes_the_adapters_out_as_peft_does() -> None:
    model = with_lora(build("qwen3_moe"))
    moe_ext.enable(model, strict=True)
    plain = model.get_base_model()
    with model.disable_adapter():
        without = model(tokens()).logits
    model.base_model.merge_adapter()
    merged = model(tokens()).logits
    assert not torch.equal(merged, without)
    with model.disable_adapter():
        model(tokens())
    assert not any(wrapper.merged for wrapper in wrappers(model))
    assert_accurate(model(tokens()).logits, merged, in_float64(model)(tokens()).logits)
    unloaded = model.unload()
    assert unloaded is plain and not wrappers(unloaded)
    assert moe_ext.explain(unloaded).enabled_count == 2


def test_merge_and_unload_leaves_an_enabled_model() -> None:
    model = with_lora(build("qwen3_moe"))
    moe_ext.enable(model, strict=True)
    expected, truth = model(tokens()).logits, in_float64(model)(tokens()).logits
    merged = model.merge_and_unload()
    assert moe_ext.explain(merged).enabled_count == 2
    assert_accurate(merged(tokens()).logits, expected, truth)
    assert moe_ext.disable(merged) == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = with_lora(build("qwen3_moe")).train()
    moe_ext.enable(model, strict=True)
    plain = logits_and_gradients(model, tokens())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()
    with never_dense():
        checkpointed = logits_and_gradients(model, tokens())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_steps_move_the_adapters_as_peft_does(dtype: torch.dtype) -> None:
    def train(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.SGD(trained.values(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for seed in range(3):
            x, target = (torch.randn(96, 32, generator=generator).bfloat16().to(dtype) for _ in range(2))
            optimizer.zero_grad()
            (run(model, x, *routing(96, 5, seed=seed)).to(dtype) - target).square().mean().backward()
            optimizer.step()
        return {name: p.detach() - before[name] for name, p in trained.items()}

    model = experts_with_lora("qwen3_moe", dtype)
    exact, enabled = exact_copy(model), copy.deepcopy(model)
    truth, plain = train(exact, torch.float64), train(model, dtype)
    moe_ext.enable(enabled, strict=True)
    with never_dense():
        new = train(enabled, dtype)
    assert_all_accurate(new, plain, truth)


def test_T96_the_whole_experts_compile_to_one_graph() -> None:
    model = activate(second(experts_with_lora("qwen3_moe")), "default", "other")
    moe_ext.enable(model, strict=True)
    x, (index, w) = torch.randn(12, 32), routing(12, 5)
    held = next(m for m in model.modules() if isinstance(m, Holder))
    compiled = torch.compile(held.experts_of_mine, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, index, w), run(model, x, index, w)
    assert torch.equal(out, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    for grad, same in zip(torch.autograd.grad(out.sum(), trained), torch.autograd.grad(expected.sum(), trained), strict=True):
        assert torch.equal(grad, same)


# -------------------------------------------------------------------------------------------------------------------------- lifecycle
def test_T98_saving_loading_and_copying(tmp_path) -> None:
    model = with_lora(build("qwen3_moe"))
    keys = list(model.state_dict())
    moe_ext.enable(model, strict=True)
    expected = model(tokens()).logits
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = build("qwen3_moe")
    moe_ext.enable(again, strict=True)
    again = peft.PeftModel.from_pretrained(again, tmp_path)
    other = copy.deepcopy(model)
    with never_dense():
        assert torch.equal(again(tokens()).logits, expected) and torch.equal(other(tokens()).logits, expected)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(tokens()).logits, expected), "the copy reads the original's adapters"


def test_T88_T93_after_disable_and_other_implementations_peft_does_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(build("qwen3_moe"))
    before = model(tokens()).logits
    moe_ext.enable(model, strict=True)
    enabled = model(tokens()).logits
    assert not torch.equal(enabled, before)  # another order of the same sums
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    assert torch.equal(model(tokens()).logits, before)
    monkeypatch.delenv("MOE_EXT_DISABLE")
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(tokens()).logits, before)
    model.set_experts_implementation("moe_ext")
    assert torch.equal(model(tokens()).logits, enabled)
    moe_ext.disable(model)
    assert torch.equal(model(tokens()).logits, before)


def test_a_skipped_neighbour_keeps_its_adapters() -> None:
    """Its config names our implementation, and it runs its own: PEFT's sums are there when it does."""
    model = with_lora(build("qwen3_moe"))
    before = model(tokens()).logits
    moe_ext.enable(model, strict=True)
    for experts in decorated_experts(model):
        decorated.apply(experts, decorated.Skipped(decorated.plan_of(experts).previous, "of this test"))
    assert torch.equal(model(tokens()).logits, before)


def test_T44_inputs_of_another_dtype_fall_back_with_the_adapters() -> None:
    model = experts_with_lora("qwen3_moe")
    x, (index, w) = torch.randn(12, 32), routing(12, 5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, x, index, w)
    moe_ext.enable(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        new = run(model, x, index, w)
    assert_accurate(new, plain, run(exact_copy(model), x.double(), index, w.double()))
    moe_ext.disable(model)
    with pytest.raises(RuntimeError) as own:
        run(model, x.double(), index, w)
    moe_ext.enable(model, strict=True)
    with pytest.raises(RuntimeError) as fallen_back:
        run(model, x.double(), index, w)
    assert str(fallen_back.value) == str(own.value)


def test_T87_adapters_are_never_dropped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = experts_with_lora("qwen3_moe")
    x, (index, w) = torch.randn(12, 32), routing(12, 5)
    before = run(model, x, index, w)
    moe_ext.enable(model, strict=True)
    experts = decorated_experts(model)[0]
    experts.forward = lambda *args: decorated.run_implementation(experts, "eager", *args)  # someone's own forward
    assert torch.equal(run(model, x, index, w), before)
    del experts.forward
    registry = decorated.transformers_facts.experts_registry()
    monkeypatch.setitem(registry._global_mapping, decorated.IMPLEMENTATION, lambda module, x, *routing: x)
    with pytest.raises(RuntimeError, match=r"did not run moe_ext, which was to apply its adapters \['default'\]"):
        run(model, x, index, w)


def test_peft_imported_after_enable_is_right_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of PEFT's class is then its own, until `enable` is called again."""
    model = experts_with_lora("qwen3_moe")
    moe_ext.enable(model, strict=True)
    kind = peft.tuners.lora.layer.ParamWrapper
    monkeypatch.setattr(kind, "_activate_lora", getattr(kind, ours._ORIGINAL))
    monkeypatch.delattr(kind, ours._ORIGINAL)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("moe_ext").addHandler(handler)
    try:
        new = outputs_and_gradients(model, run, torch.float32)
    finally:
        logging.getLogger("moe_ext").removeHandler(handler)
    assert len(records) == 1 and "moe_ext.enable(model) again" in records[0].getMessage()
    assert moe_ext.disable(model) == 1
    assert_all_accurate(new, outputs_and_gradients(model, run, torch.float32), truth_of(model))
    check(model)


def test_experts_implementation_by_name_runs_adapters_grouped() -> None:
    moe_ext.register()
    model = with_lora(build("qwen3_moe", experts_implementation="moe_ext"))
    with never_dense():
        named = model(tokens()).logits
    other = with_lora(build("qwen3_moe"))
    moe_ext.enable(other, strict=True)
    assert torch.equal(named, other(tokens()).logits)


def test_calls_of_several_threads_do_not_meet() -> None:
    model = experts_with_lora("qwen3_moe")
    moe_ext.enable(model, strict=True)
    inputs = [(torch.randn(16, 32), *routing(16, 5, seed=seed)) for seed in range(4)]
    with torch.no_grad():
        expected = [run(model, *one) for one in inputs]
        barrier = threading.Barrier(4)

        def wait(*_: Any) -> None:
            barrier.wait()

        wrappers(model)[0].base_layer.register_forward_pre_hook(wait)  # all of them are inside the outer wrapper
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(torch.no_grad()(lambda one: run(model, *one)), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------- experts without a decorator
def llama4() -> Any:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1, pad_token_id=None,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config)
    randomise(model)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
def test_T128_stacks_without_a_decorator_with_adapters_on_them(when: str) -> None:
    """A proof leaves the module as it was, also where PEFT puts a parametrization on it and takes it off in each call."""
    model, names = llama4(), ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    if when == "before":
        moe_ext.enable(model, strict=True)
    model = attach(model.requires_grad_(False), target_modules=[], target_parameters=names)
    plain = copy.deepcopy(model)
    moe_ext.disable(plain)
    classes = [type(m) for m in model.modules()]
    if when == "after":
        moe_ext.enable(model, strict=True)
    assert [type(m) for m in model.modules()] == classes
    assert dict(model.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    exact = exact_copy(plain)
    new, old, truth = (logits_and_gradients(one, tokens()) for one in (model, plain, exact))
    for name in truth:
        assert_accurate(new[name], old[name], truth[name], name)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert type(p) is type(q) and p.requires_grad == q.requires_grad

"""Known traps of patching models, of routing and of the block contract; a test's id carries the trap's number.

Not here:
T10 a plan that keeps `experts.forward` keeps what asks the registry: on decorated experts nothing is put on the instance.
T13 llama4's forward of one argument is an entry of test_architectures.py; T53 square weights are in test_own_blocks.py.
T57 stacked weights are read at each call, not cached; what is cached of 4-bit weights is in test_bitsandbytes_blocks.py.
T96 a compiled model is in test_enable_stacked.py and test_lifecycle_models.py; T97 nothing is tuned; T99 there are no lists of modules.
T100 what the look at the experts sees is in test_placement.py; its time is in benchmarks/results.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.integrations.run import decorated, patch
from moe_ext.testing import assert_accurate
from tests.helpers.models import (
    BOTH,
    Holder,
    build,
    build_experts,
    expert_blocks,
    in_float64,
    logits_and_gradients,
    needs_tf4,
    needs_tf5,
    routing,
    tokens,
)

pytestmark = pytest.mark.tf4


def is_enabled(module: nn.Module) -> bool:
    return decorated.is_enabled(module) if decorated.plan_of(module) else patch.is_enabled(module)


def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(seed=seed)).logits


# ------------------------------------------------------------------------------------------------------------ routing and contract
def test_T1_router_jitter_draws_the_same_noise() -> None:
    model = build("mixtral", router_jitter_noise=0.3).train()
    exact = in_float64(model)
    assert moe_ext.enable(copy.deepcopy(model), strict=True).enabled_count == 2
    results, states = [], []
    for one, enabled in ((model, False), (copy.deepcopy(model), True)):
        if enabled:
            moe_ext.enable(one, strict=True)
        torch.manual_seed(5)
        results.append(logits_and_gradients(one, tokens())["logits"])
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(results[0], logits(model.eval()))
    # The noise is drawn in float32, so the truth has other noise: what remains of the rule is that both agree to its yardstick.
    plain = logits_and_gradients(model.eval(), tokens())["logits"]
    yardstick = (plain - logits_and_gradients(exact.eval(), tokens())["logits"]).norm() / plain.norm()
    assert (results[1] - results[0]).norm() / results[0].norm() <= 4 * yardstick


@pytest.mark.parametrize("family", BOTH)
def test_T2_the_models_own_gate_decides(family: str) -> None:
    """A gate that is changed after enabling is followed."""
    model = build(family)
    moe_ext.enable(model)
    before = logits(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate.weight"):
                p.neg_()
    after = logits(model)
    moe_ext.disable(model)
    truth = in_float64(model)
    assert not torch.equal(after, before)
    assert_accurate(after, logits(model), logits(truth))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", BOTH)
def test_T3_renormalisation_is_the_blocks_own(family: str, norm: bool) -> None:
    options = {} if family == "mixtral" else {"norm_topk_prob": norm}
    model = build(family, **options)
    plain, truth = logits(model), logits(in_float64(model))
    moe_ext.enable(model, strict=True)
    assert_accurate(logits(model), plain, truth)


@needs_tf4
def test_T3_renormalisation_is_read_at_each_call() -> None:
    model = build("qwen3_moe", norm_topk_prob=True)
    other = build("qwen3_moe", norm_topk_prob=False)
    moe_ext.enable(model)
    moe_ext.enable(other)
    for block in expert_blocks(model):
        block.norm_topk_prob = False
    assert torch.equal(logits(model), logits(other))


@needs_tf5
def test_T4_routing_weights_are_not_rounded() -> None:
    """float32 routing weights of a bfloat16 layer act in float32: twice the weight is exactly twice the result's float32 sum."""
    module = build_experts("deepseek_v3", torch.bfloat16)
    index, w = routing(6, 5)
    x = torch.randn(6, 32).bfloat16()
    moe_ext.enable(Holder(module))
    assert not torch.equal(w, w.bfloat16().float())
    w.requires_grad_()
    module(x, index, w).sum().backward()
    assert w.grad.dtype == torch.float32 and not torch.equal(w.grad, w.grad.bfloat16().float())


@pytest.mark.parametrize("family", BOTH)
def test_T5_return_contract_of_the_block(family: str) -> None:
    model = build(family)
    block = next(m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate"))
    x = torch.randn(2, 3, 32)
    before = block(x.clone())
    moe_ext.enable(model)
    after = block(x.clone())
    assert type(after) is type(before)
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("family", BOTH)
def test_T6_router_logits_are_recorded(family: str) -> None:
    model = build(family)
    before = model(tokens(), output_router_logits=True)
    moe_ext.enable(model)
    for _ in range(2):
        after = model(tokens(), output_router_logits=True)
        assert len(after.router_logits) == len(before.router_logits) == 2
        assert torch.equal(after.router_logits[0], before.router_logits[0])
    assert all(is_enabled(block) for block in expert_blocks(model))
    moe_ext.disable(model)
    assert torch.equal(model(tokens(), output_router_logits=True).logits, before.logits)
    moe_ext.enable(model, strict=True)  # recording leaves the block's own forward on the instance: not a patch of anybody's
    assert all(is_enabled(block) for block in expert_blocks(model))


@needs_tf5
def test_T7_shared_experts_stay_outside() -> None:
    model = build("qwen2_moe")
    plain, truth = logits(model), logits(in_float64(model))
    report = moe_ext.enable(model, strict=True)
    assert all(b.module.endswith(".experts") for b in report.blocks)
    assert_accurate(logits(model), plain, truth)


def test_T8_the_attribute_that_holds_the_block_does_not_matter() -> None:
    model = build("mixtral")
    for layer in model.model.layers:
        name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
        layer.ffn_of_mine = getattr(layer, name)
        delattr(layer, name)
    assert [b.enabled for b in moe_ext.enable(model).blocks] == [True, True]


@needs_tf5
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_T9_T12_sentinels_and_id_dtypes_and_nothing_is_written(dtype: torch.dtype) -> None:
    module = build_experts("mixtral")
    moe_ext.enable(Holder(module))
    index, w = routing(6, 5)
    x = torch.randn(6, 32)
    index[2, 1] = 5  # the sentinel of expert parallelism: one past the last
    masked = w.clone()
    masked[2, 1] = 0
    kept = [t.clone() for t in (x, index, w)]
    out = module(x, index.to(dtype), w)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, index, w), strict=True))
    assert torch.equal(out, module(x, index.clamp(max=4), masked))


# -------------------------------------------------------------------------------------------------------------- weights and modules
@needs_tf5
@pytest.mark.parametrize(
    "act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu", "relu2", "swish", "quick_gelu", "mish", "leaky_relu"]
)
def test_T51_the_real_activation_is_recognised_or_called(act: str) -> None:
    module = build_experts("mixtral", hidden_act=act)
    index, w = routing(8, 5)
    x = torch.randn(8, 32)
    plain, truth = module(x, index, w), copy.deepcopy(module).double()(x.double(), index, w.double())
    report = moe_ext.enable(Holder(module), strict=True)
    assert report.blocks[0].path == ("composed" if act in ("quick_gelu", "mish", "leaky_relu") else "fused")
    assert_accurate(module(x, index, w), plain, truth)


@needs_tf4
def test_T51_every_experts_activation_is_looked_at() -> None:
    model = build("qwen3_moe")
    expert_blocks(model)[0].experts[5].act_fn = nn.ReLU()
    expert_blocks(model)[1].experts[5].act_fn = nn.Mish()
    with pytest.raises(moe_ext.NoExpertsFound, match=r"layers.\{0-1\}.*experts.5 has another act_fn than experts.0"):
        moe_ext.enable(model)


@needs_tf5
def test_T52_T53_square_weights_follow_the_flags() -> None:
    """Every matrix is [32, 32], or [32, 64] either way: only the flags tell the layouts apart."""
    for family in ("gpt_oss", "aria", "mixtral", "nemotron_h"):
        options = {"moe_intermediate_size": 32} if family == "nemotron_h" else {"intermediate_size": 32}
        module = build_experts(family, **options)
        index, w = routing(8, 5)
        x = torch.randn(8, 32)
        plain, truth = module(x, index, w), copy.deepcopy(module).double()(x.double(), index, w.double())
        assert moe_ext.enable(Holder(module), strict=True).enabled_count == 1
        assert_accurate(module(x, index, w), plain, truth, family)


@needs_tf5
def test_T54_sizes_come_from_the_tensors() -> None:
    module = build_experts("mixtral")
    for name in ("num_experts", "hidden_dim", "intermediate_dim"):
        setattr(module, name, None)
    module.config.num_local_experts = module.config.intermediate_size = 999
    assert moe_ext.enable(Holder(module), prove=False).enabled_count == 1
    index, w = routing(6, 5)
    assert module(torch.randn(6, 32), index, w).shape == (6, 32)


@pytest.mark.parametrize("family", BOTH)
def test_T55_class_names_do_not_matter(family: str) -> None:
    model = build(family)
    for block in expert_blocks(model):
        block.__class__ = type("ParametrizedNaiveThing", (type(block),), {})
    assert moe_ext.enable(model, strict=True).enabled_count == 2


@needs_tf4
def test_T56_hooks_on_experts_attached_later_are_called() -> None:
    model = build("qwen3_moe")
    before = logits(model)
    moe_ext.enable(model)
    seen: list[torch.Size] = []
    handles = [
        block.experts[e].down_proj.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        for block in expert_blocks(model)
        for e in range(8)
    ]
    assert torch.equal(logits(model), before)
    assert seen
    for handle in handles:
        handle.remove()
    seen.clear()
    assert_accurate(logits(model), before, logits(in_float64(model)))
    assert not seen


@needs_tf4
def test_T73_adapters_attached_later_are_never_ignored() -> None:
    model = build("olmoe")
    moe_ext.enable(model)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) * 1.5

    for block in expert_blocks(model):
        block.experts[2].up_proj = Adapter(block.experts[2].up_proj)
    after = logits(model)
    moe_ext.disable(model)
    assert torch.equal(after, logits(model))
    report = pytest.raises(moe_ext.NoExpertsFound, moe_ext.enable, model)
    assert "experts.2.up_proj is a Adapter, not a linear layer" in str(report.value)


@needs_tf5
def test_T73_parametrized_weights_are_seen_at_each_call() -> None:
    module = build_experts("mixtral")
    moe_ext.enable(Holder(module))
    index, w = routing(6, 5)
    x = torch.randn(6, 32)

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    before = module(x, index, w)
    nn.utils.parametrize.register_parametrization(module, "down_proj", Double())
    assert torch.equal(module(x, index, w), before * 2)
    assert moe_ext.enable(Holder(module), strict=True).enabled_count == 1
    module(x, index, w).sum().backward()
    assert module.parametrizations.down_proj.original.grad.abs().sum() > 0


@needs_tf4
def test_T58_heterogeneous_experts_are_left_alone_and_shared_ones_work() -> None:
    model = build("qwen3_moe")
    first, second = expert_blocks(model)
    first.experts[1].up_proj = nn.Linear(32, 40, bias=False)
    second.experts[3] = second.experts[0]
    first.experts[1].down_proj = nn.Linear(40, 32, bias=False)
    first.experts[1].gate_proj = nn.Linear(32, 40, bias=False)
    plain, truth = logits_and_gradients(model, tokens()), logits_and_gradients(in_float64(model), tokens())
    report = moe_ext.enable(model)
    assert report.blocks[0].reason == "experts.1 differs in shapes or biases from experts.0" and report.blocks[1].enabled
    new = logits_and_gradients(model, tokens())
    for name in truth:
        assert_accurate(new[name], plain[name], truth[name], name)


@pytest.mark.parametrize("family", BOTH)
def test_T59_no_weight_is_copied(family: str) -> None:
    model = build(family)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    attributes = [t.shape for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    moe_ext.enable(model)
    logits_and_gradients(model, tokens())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert [t.shape for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)] == attributes


# ------------------------------------------------------------------------------------------------------------------------ lifecycle
@needs_tf4
def test_T88_a_wrapper_put_around_ours_stays() -> None:
    model = build("mixtral")
    before = logits(model)
    moe_ext.enable(model)
    block = expert_blocks(model)[0]
    calls = []
    inner = block.forward

    def wrapper(hidden_states: torch.Tensor):
        calls.append(len(calls))
        return inner(hidden_states)

    block.forward = wrapper
    moe_ext.disable(model)
    assert block.forward is wrapper and torch.equal(logits(model), before) and len(calls) == 1
    moe_ext.enable(model, strict=True)
    assert block.forward is wrapper and is_enabled(block)
    enabled = logits(model)
    assert len(calls) == 2 and not torch.equal(enabled, before)
    block.forward = inner  # the wrapper goes away
    moe_ext.disable(model)
    assert torch.equal(logits(model), before) and "forward" not in block.__dict__


@needs_tf4
def test_T88_a_foreign_forward_is_left_alone() -> None:
    model = build("mixtral")
    first, second = expert_blocks(model)
    first.forward = types.MethodType(lambda self, hidden_states: type(self).forward(self, hidden_states), first)
    kept = first.forward
    report = moe_ext.enable(model)
    assert "forward was replaced on the instance" in report.blocks[0].reason and report.blocks[1].enabled
    moe_ext.disable(model)
    assert first.forward is kept


@needs_tf5
def test_T88_an_implementation_chosen_since_stays() -> None:
    model = build("qwen3_moe")
    moe_ext.enable(model)
    model.set_experts_implementation("batched_mm")
    moe_ext.disable(model)
    assert model.get_experts_implementation() == {"": "batched_mm"}


@pytest.mark.parametrize("family", BOTH)
def test_T89_enable_and_disable_again_and_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    before = logits(model)
    first = moe_ext.enable(model)
    enabled = logits(model)
    assert moe_ext.enable(model).to_dict()["blocks"] == first.to_dict()["blocks"]
    assert torch.equal(logits(model), enabled)
    with moe_ext.patched(model):
        assert torch.equal(logits(model), enabled)
    assert all(is_enabled(block) for block in expert_blocks(model))
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    assert torch.equal(logits(model), before)
    monkeypatch.delenv("MOE_EXT_DISABLE")
    assert torch.equal(logits(model), enabled)
    assert (moe_ext.disable(model), moe_ext.disable(model)) == (2, 0)
    assert torch.equal(logits(model), before)
    with moe_ext.patched(model) as report:
        assert report.enabled_count == 2 and torch.equal(logits(model), enabled)
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyError), moe_ext.patched(model):
        raise KeyError
    assert torch.equal(logits(model), before) and not any(is_enabled(block) for block in expert_blocks(model))


# T90 (`hasattr(x, "base_layer")`) cannot apply: no attribute of adapters is asked for; anything but a plain nn.Linear is left alone.


@pytest.mark.parametrize("family", BOTH)
def test_T91_gradient_checkpointing_switched_later(family: str) -> None:
    model = build(family).train()
    moe_ext.enable(model)
    plain = logits_and_gradients(model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = logits_and_gradients(model, tokens())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_T92_only_reasons_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """At forward nothing is caught: an error of the op reaches the caller instead of turning into a slow fallback."""
    model = build("olmoe")
    moe_ext.enable(model)

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("moe_ext.functional.grouped_experts", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        logits(model)


@needs_tf5
def test_T93_set_experts_implementation_stays_effective() -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation("eager")
    eager = logits(model)
    moe_ext.enable(model)
    enabled = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), eager)
    assert moe_ext.explain(model).enabled_count == 0
    model.set_experts_implementation("moe_ext")
    assert torch.equal(logits(model), enabled)
    assert type(expert_blocks(model)[0]).__name__ == "Qwen3MoeExperts"


def test_T94_dense_and_missing_layers_do_not_end_the_search() -> None:
    model = build("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1])
    model.model.layers[0].mlp = None
    names = [b.module for b in moe_ext.enable(model, strict=True).blocks]
    assert [name.split(".")[2] for name in names] == ["2", "3"]


def test_T95_cpu_host_needs_no_gpu_and_import_needs_no_transformers() -> None:
    code = (
        "import sys, torch, moe_ext\n"
        "assert 'transformers' not in sys.modules and not torch.cuda.is_initialized()\n"
        "try: moe_ext.enable(torch.nn.Linear(2, 2))\n"
        "except moe_ext.NoExpertsFound: pass\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", BOTH)
def test_T98_deepcopy_uses_the_copys_own_weights(family: str) -> None:
    model = build(family)
    before = logits(model)
    moe_ext.enable(model)
    enabled = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(twin), enabled) and all(is_enabled(block) for block in expert_blocks(twin))
    assert moe_ext.disable(twin) == 2
    assert torch.equal(logits(twin), before)
    assert all(is_enabled(block) for block in expert_blocks(model))


@pytest.mark.parametrize("family", BOTH)
def test_T98_pickle_and_state_dict(family: str, tmp_path) -> None:
    model = build(family)
    keys = list(model.state_dict())
    moe_ext.enable(model)
    enabled = logits(model)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), enabled) and all(is_enabled(block) for block in expert_blocks(loaded))
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not any(is_enabled(block) for block in expert_blocks(plain))
    moe_ext.enable(plain, strict=True)
    assert torch.equal(logits(plain), enabled)


@needs_tf5
def test_T98_an_unpickled_model_finds_the_implementation_in_a_new_process(tmp_path) -> None:
    model = build("qwen3_moe")
    moe_ext.enable(model)
    torch.save({"model": model, "logits": logits(model), "tokens": tokens()}, tmp_path / "all.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.equal(saved['model'](saved['tokens']).logits, saved['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "all.pt")], check=True)

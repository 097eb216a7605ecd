"""The proof: it rejects what is wrong, with figures, and leaves no trace on what it looks at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext import functional
from moe_ext.integrations import sandbox
from tests.helpers.models import BOTH, Holder, build, build_experts, expert_blocks, needs_tf5, transformers_major

pytestmark = pytest.mark.tf4


def state(model: nn.Module) -> dict[str, object]:
    return {
        "random": torch.get_rng_state().tolist(),
        "tensors": {n: (t, t._version, t.requires_grad, t.grad) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "training": [m.training for m in model.modules()],
        "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
    }


@pytest.mark.parametrize("family", BOTH)
def test_proof_leaves_no_trace(family: str) -> None:
    model = build(family)
    expert_blocks(model)[0].eval()
    calls: list[str] = []
    for block in expert_blocks(model):
        for name, module in block.named_modules():
            if next(module.parameters(), None) is not None:
                module.register_buffer("seen", torch.zeros(1))
            if not name.startswith("experts"):  # hooks there would be a reason to leave it alone
                module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for p in model.parameters():
        p.register_hook(lambda grad: calls.append("gradient"))
    some = next(p for p in model.parameters() if p.dim() > 1)
    some.grad = torch.ones_like(some)
    some.requires_grad_(False)
    before = state(model)
    moe_ext.enable(model)
    after = state(model)
    assert calls == []
    for key in ("random", "training", "hooks"):
        assert after[key] == before[key], key
    for name, (tensor, version, requires_grad, grad) in before["tensors"].items():  # type: ignore[attr-defined]
        now = after["tensors"][name]  # type: ignore[index]
        assert now[0] is tensor and now[1:3] == (version, requires_grad) and now[3] is grad, name


def test_buffers_that_the_block_writes_are_put_back() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("count", torch.zeros(1))
    with sandbox.sandbox(module):
        module.count += 1
        module.train(False)
        torch.rand(3)
    assert module.count.item() == 0 and module.training


def test_proof_runs_without_gradients_and_in_inference_mode_too() -> None:
    with torch.no_grad():
        assert moe_ext.enable(build("mixtral"), strict=True).enabled_count == 2
    model = build("mixtral")
    with torch.inference_mode():
        assert moe_ext.enable(model, strict=True).enabled_count == 2


@pytest.mark.parametrize("broken", ["output", "gradient of hidden_states", "gradient of top_k_weights"])
def test_a_wrong_kernel_is_caught_with_figures(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = functional.grouped_experts

    def wrong(hidden_states, top_k_index, top_k_weights, *args, **kwargs):
        if broken == "gradient of hidden_states":
            hidden_states = hidden_states + (hidden_states - hidden_states.detach()) * 1e-3
        if broken == "gradient of top_k_weights":
            top_k_weights = top_k_weights + (top_k_weights - top_k_weights.detach()) * 1e-3
        out = honest(hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        return out * 1.001 if broken == "output" else out

    monkeypatch.setattr(functional, "grouped_experts", wrong)
    model = build("qwen3_moe")
    report = moe_ext.enable(model)
    assert report.enabled_count == 0 and len(report.skipped) == 2
    for block in report.blocks:
        assert "moe_ext's" in block.reason and "allowed 2" in block.reason and block.path == "original"
    with pytest.raises(moe_ext.EnableError):
        moe_ext.enable(model, strict=True)
    # Only of decorated experts enough is known without a proof.
    assert moe_ext.enable(model, prove=False).enabled_count == (2 if transformers_major() >= 5 else 0)


def test_an_exception_of_the_block_is_a_reason_and_running_out_of_memory_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")

    def raises(error: Exception):
        def grouped_experts(*args, **kwargs):
            raise error

        monkeypatch.setattr(functional, "grouped_experts", grouped_experts)

    raises(RuntimeError("moe_ext::grouped_mm: no kernel for this"))
    assert "no kernel for this" in moe_ext.enable(model).blocks[0].reason
    raises(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        moe_ext.enable(model)
    monkeypatch.undo()
    assert not any(b.enabled for b in moe_ext.explain(model).blocks)


def test_meta_weights_are_explained_but_not_proven() -> None:
    model = build("qwen3_moe").to("meta")
    assert [b.status for b in moe_ext.explain(model).blocks] == ["can be enabled"] * 2
    report = moe_ext.enable(model)
    assert report.enabled_count == 0 and all("meta" in b.reason for b in report.blocks)


@needs_tf5
def test_a_lying_flag_is_caught() -> None:
    """The flags are trusted to say the formula, and the proof is what that trust is checked with."""
    module = build_experts("mixtral", intermediate_size=32)  # 2I = 64, H = 32, down [E,32,32] is square
    wrong = copy.deepcopy(module)
    wrong.is_transposed = True
    assert moe_ext.enable(Holder(module)).enabled_count == 1
    assert "could not be proven" in moe_ext.enable(Holder(wrong)).blocks[0].reason
    other = build_experts("mixtral")
    other._apply_gate = lambda gate_up: other.act_fn(gate_up.chunk(2, -1)[1]) * gate_up.chunk(2, -1)[0]
    assert "formula is another than the one detected" in moe_ext.enable(Holder(other)).blocks[0].reason


@needs_tf5
def test_frozen_weights_are_proven_without_their_gradients() -> None:
    module = build_experts("qwen3_moe").requires_grad_(False)
    figures = moe_ext.enable(Holder(module)).blocks[0].figures
    assert set(figures) == {"output", "gradient of hidden_states", "gradient of top_k_weights"}

"""The report as text and as data, and the errors that carry it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.report import BlockReport, EnableReport
from tests.helpers.models import BOTH, build

pytestmark = pytest.mark.tf4


def test_table_is_aligned_and_ends_with_totals() -> None:
    report = moe_ext.enable(build("qwen3_moe"))
    header, rule, row, totals = str(report).splitlines()
    assert header.split() == ["module", "class", "layout", "path", "status"] and set(rule) == {"-"}
    assert row.index("fused") == header.index("path") and row.index("enabled") == header.index("status")
    assert "layers.{0-1}.mlp" in row
    assert totals.startswith("Qwen3MoeForCausalLM: 2 of 2 expert blocks enabled (2 fused), 2 proven in ")


def test_rows_are_shared_only_by_blocks_that_are_alike() -> None:
    blocks = [
        BlockReport(f"layers.{i}.mlp", "A", "stacked", "fused", enabled=i != 2, reason="why not" if i == 2 else None) for i in range(5)
    ]
    blocks += [BlockReport("layers.7.mlp", "A", "stacked", "fused", enabled=True), BlockReport("other", "B", "stacked")]
    text = str(EnableReport("M", blocks))
    names = [line.split()[0] for line in text.splitlines()[2:-1]]
    assert names == ["layers.{0-1}.mlp", "layers.2.mlp", "layers.{3-4}.mlp", "layers.7.mlp", "other"]
    assert "why not" in text and "can be enabled" in text
    assert text.splitlines()[-1] == "M: 5 of 7 expert blocks enabled (5 fused), 1 can be enabled, 1 skipped"
    assert "{0-4 step 2}" in str(
        EnableReport("M", blocks[:1] + [BlockReport(f"layers.{i}.mlp", "A", "stacked", "fused", True) for i in (2, 4)])
    )


@pytest.mark.parametrize("family", BOTH)
def test_to_dict_is_json(family: str) -> None:
    report = moe_ext.enable(build(family))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["enabled_count"] == len(data["blocks"]) == 2
    first = data["blocks"][0]
    assert first["enabled"] and first["reason"] is None and first["path"] == "fused"
    assert any("gradient of hidden_states" in name for name in first["proof"])
    assert all(figure["error"] <= 2 * figure["plain"] for figure in first["proof"].values())


def test_a_model_without_experts_says_so() -> None:
    model = build("llama")
    for call in (moe_ext.enable, moe_ext.explain):
        with pytest.raises(moe_ext.NoExpertsFound, match="LlamaForCausalLM has no experts .* none of its [0-9]+ modules") as error:
            call(model)
        assert isinstance(error.value, ValueError) and error.value.rejected == []


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, 8, 8))


class Strange(nn.Module):
    """Experts of three kinds that nothing here can compute, beside a convolution, whose weight has three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3)
        self.my_experts = Stack()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})}) for _ in range(3)
        )
        self.block = nn.Module()
        self.block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def test_what_looks_like_experts_is_listed_with_the_reason() -> None:
    with pytest.raises(moe_ext.NoExpertsFound) as error:
        moe_ext.enable(Strange())
    text = str(error.value)
    assert "my_experts (Stack): w1 (4, 8, 8) are no two or three matrices per expert beside a router" in text
    for name in ("layers.{0-2}.experts (ModuleDict)", "block.experts (ModuleList)"):
        assert f"{name}: its experts (Linear) are not alike MLPs of two or three linear layers beside a router" in text
    assert "conv" not in text


def test_own_grouped_experts_need_no_enabling() -> None:
    model = nn.Sequential(moe_ext.GroupedExperts(4, 16, 8))
    with pytest.raises(moe_ext.NoExpertsFound, match="is a moe_ext.GroupedExperts already"):
        moe_ext.enable(model)


def test_environment_switch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXT_DISABLE", "1")
    report = moe_ext.enable(build("mixtral"))
    assert report.enabled_count == 0 and len(report.skipped) == 2
    assert str(report).splitlines()[-1] == "MOE_EXT_DISABLE is set: nothing was enabled"


def test_strict_raises_with_the_report_for_experts_nothing_is_known_about() -> None:
    model = build("mixtral")
    model.my_experts = Stack()
    assert [b.enabled for b in moe_ext.enable(model).blocks] == [True, True, False]
    moe_ext.disable(model)
    with pytest.raises(moe_ext.EnableError, match="1 of 3 expert blocks would be skipped"):
        moe_ext.enable(model, strict=True)
    assert moe_ext.explain(model).enabled_count == 0


class FP8Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*sizes, bias=False) for sizes in ((16, 8), (16, 8), (8, 16)))
        for layer in self.children():
            layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (layer.weight.to(x.dtype) for layer in self.children())
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


class FP8Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(FP8Expert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("asked", [moe_ext.explain, moe_ext.enable], ids=["explain", "enable"])
def test_T145_explain_gives_the_reason_for_which_enable_refuses_experts_in_fp8(asked: Callable[..., EnableReport]) -> None:
    with pytest.raises(moe_ext.NoExpertsFound) as error:
        asked(nn.Sequential(FP8Block()))
    (block,) = error.value.rejected
    assert block.reason == "a weight is float8_e4m3fn; supported are float64, float32, bfloat16, float16"

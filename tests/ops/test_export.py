"""Deployment from Python: torch.export and .pt2 files, an AOTInductor package, TorchScript; each with several token counts.

What is loaded back must run the same op: its result has eager's bits wherever the code around it is the same too (export, script,
trace); an AOTInductor package has a softmax of its own, so it obeys the error rule.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_ext
from moe_ext import testing
from moe_ext.experts import ExpertSpec
from tests.ops.moe_layer import LAYERS, E, ListLayer, StackedLayer, plain, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch.export, about itself
]

COUNTS = (16, 40, 200)
ALL_COUNTS = (0, 1, *COUNTS)
DYNAMIC = {"x": {0: torch.export.Dim("tokens")}}


def frozen(kind: str, dtype: torch.dtype = torch.float32) -> StackedLayer:
    return LAYERS[kind](dtype).eval().requires_grad_(False)


def export(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    return torch.export.export(layer, (tokens(7, dtype),), dynamic_shapes=DYNAMIC)


def moe_targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("moe.")]


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("kind", ["stacked", "list"])
def test_exported_graph_holds_the_public_op(kind: str, grad: bool) -> None:
    layer = frozen(kind).requires_grad_(grad)
    name = "moe.grouped_forward." + ("list" if kind == "list" else "default")
    program = export(layer)
    assert moe_targets(program) == [name]
    assert moe_targets(program.run_decompositions()) == [name]


@pytest.mark.parametrize("kind", LAYERS)
def test_export_save_load_run(kind: str, tmp_path: Path) -> None:
    layer = frozen(kind)
    path = tmp_path / "layer.pt2"
    torch.export.save(export(layer), path)
    loaded = torch.export.load(path).module()
    for count in ALL_COUNTS:
        x = tokens(count)
        (y, index), (y_eager, index_eager) = loaded(x), layer(x)
        assert torch.equal(index, index_eager) and torch.equal(y, y_eager)


def test_export_keeps_every_option(tmp_path: Path) -> None:
    class GptOss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden, inner = 16, 8
            self.gate_up_proj, self.gate_up_bias = torch.randn(E, hidden, 2 * inner), torch.randn(E, 2 * inner)
            self.down_proj, self.down_bias = torch.randn(E, inner, hidden), torch.randn(E, hidden)

        def forward(self, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
            return torch.ops.moe.grouped_forward(
                x, index, w, self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias,
                activation="swigluoai", transposed=True, interleaved=True, alpha=1.702, limit=0.5,
            )  # fmt: skip

    def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(count, 16), torch.randint(-1, E + 1, (count, 2)), torch.rand(count, 2)

    torch.manual_seed(0)
    layer, rows = GptOss(), {0: torch.export.Dim("tokens")}
    torch.export.save(torch.export.export(layer, inputs(5), dynamic_shapes=(rows, rows, rows)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for count in ALL_COUNTS:
        args = inputs(count)
        assert torch.equal(loaded(*args), layer(*args))


def test_aot_inductor_package(tmp_path: Path) -> None:
    """Both overloads in one package: compiling one takes ten seconds."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked, self.listed = frozen("stacked", torch.bfloat16), frozen("list", torch.bfloat16)

        def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
            return self.stacked(x), self.listed(x)

    both = Both()
    path = torch._inductor.aoti_compile_and_package(export(both, torch.bfloat16), package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for count in COUNTS:
        x = tokens(count, torch.bfloat16)
        for layer, (y, index) in zip((both.stacked, both.listed), loaded(x), strict=True):
            truth = plain(copy.deepcopy(layer).double(), x.double(), index)
            testing.assert_accurate(y, plain(layer, x, index), truth, f"{count} tokens")


@pytest.mark.parametrize("way", ["script", "trace"])
def test_torchscript_save_load_run(way: str, tmp_path: Path) -> None:
    layer = StackedLayer()
    scripted = torch.jit.script(layer) if way == "script" else torch.jit.trace(layer, (tokens(7),))
    assert "moe::grouped_forward" in str(scripted.inlined_graph)
    scripted.save(str(tmp_path / "layer.pt"))
    loaded = torch.jit.load(str(tmp_path / "layer.pt"))
    for count in ALL_COUNTS:
        x = tokens(count)
        assert torch.equal(loaded(x)[0], layer(x)[0])


def test_torchscript_trace_of_the_list_overload(tmp_path: Path) -> None:
    layer = ListLayer().eval()
    traced = torch.jit.trace(layer, (tokens(7),))
    traced.save(str(tmp_path / "layer.pt"))
    loaded = torch.jit.load(str(tmp_path / "layer.pt"))
    for count in ALL_COUNTS:
        x = tokens(count)
        assert torch.equal(loaded(x)[0], layer(x)[0])


def test_torchscript_still_trains(tmp_path: Path) -> None:
    """In a process that has imported moe_ext, a loaded TorchScript module has gradients."""
    layer = StackedLayer()
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    loaded = torch.jit.load(str(tmp_path / "layer.pt"))
    x = tokens(7)
    loaded(x)[0].square().sum().backward()
    layer(x)[0].square().sum().backward()
    eager = dict(layer.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.grad, eager[name].grad), name


# ---- the module for own models
class OwnModel(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = moe_ext.GroupedExperts(4, 16, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, dim=-1)
        return self.experts(x, index, weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "recompute": True},
        {"gated": False, "activation": "relu2"},
        {"gated": False, "bias": True, "transposed": True},
        {"activation": "swigluoai", "alpha": 1.702, "limit": 7.0, "interleaved": True, "transposed": True, "bias": True},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_T144_grouped_experts_can_be_scripted(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = OwnModel(**options), torch.randn(2, 5, 16)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert "moe::grouped_forward" in str(loaded.inlined_graph)
    y = model(x)
    assert torch.equal(loaded(x), y) and torch.equal(torch.jit.freeze(loaded.eval())(x), y)
    assert type(model.experts) is moe_ext.GroupedExperts, "scripting leaves the model as it is"
    expected = torch.autograd.grad(y.sum(), list(model.parameters()))
    for gradient, found in zip(expected, torch.autograd.grad(loaded(x).sum(), list(loaded.parameters())), strict=True):
        assert torch.equal(gradient, found)


def test_T144_scripting_follows_the_spec_and_refuses_what_it_cannot_compile() -> None:
    model, x = OwnModel(), torch.randn(5, 16)
    torch.jit.script(model)
    model.experts.spec = ExpertSpec("gelu")
    assert torch.equal(torch.jit.script(model)(x), model(x))
    model.experts.spec = ExpertSpec(gate_fn=lambda rows: rows[..., :8])
    with pytest.raises(ValueError, match="cannot compile a gate_fn"):
        torch.jit.script(model)

"""torch.compile with fullgraph=True: no graph break, no recompile beyond the one that makes the token count dynamic.

The aot_eager backend keeps every kernel, so its results must be eager's bits; inductor generates its own softmax and sums, so its
results obey the error rule instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from moe_ext import testing
from moe_ext._needs import Needs
from tests.ops.moe_layer import LAYERS, E, K, ListLayer, StackedLayer, plain, tokens

# Older parts of torch that the compiler imports are written with decorators that newer parts call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

COUNTS = (40, 64, 200, 96)  # none of them H: sizes that are equal at first are taken to be one size
TRAIN = ("_grouped_forward_train", "_grouped_backward")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(y: Tensor, x: Tensor, layer: StackedLayer) -> dict[str, Tensor]:
    """By parameter; those of a list come as one tensor, so that they are judged as the gradient of a stack is: an expert with a
    single token has too few roundings for an error of its own."""
    leaves = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    merged: dict[str, list[Tensor]] = {}
    for name, gradient in zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True):
        merged.setdefault(name.split(".")[0], []).append(gradient)
    return {name: torch.stack(parts) for name, parts in merged.items()}


def assert_obeys_error_rule(compiled: Callable, layer: StackedLayer, count: int, autocast: bool = False) -> None:
    def context():
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    x = tokens(count, layer.router.weight.dtype).requires_grad_()
    with context():
        y, index = compiled(x)
        y_plain = plain(layer, x, index).to(y.dtype)
    double, x_double = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y_true = plain(double, x_double, index)
    testing.assert_accurate(y, y_plain, y_true, f"output, {count} tokens")
    new, old, true = gradients(y, x, layer), gradients(y_plain, x, layer), gradients(y_true, x_double, double)
    for name in new:
        testing.assert_accurate(new[name], old[name], true[name], f"gradient of {name}, {count} tokens")


@pytest.mark.parametrize("kind", LAYERS)
def test_aot_eager_gives_the_bits_of_eager(kind: str) -> None:
    layer = LAYERS[kind]()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for count in COUNTS:
        x = tokens(count).requires_grad_()
        (y, index), (y_eager, index_eager) = compiled(x), layer(x)
        assert torch.equal(index, index_eager)
        assert torch.equal(y, y_eager)
        new, old = gradients(y, x, layer), gradients(y_eager, x, layer)
        assert all(torch.equal(new[name], old[name]) for name in old)
    assert backend.frame_count == 2, "one graph for the first token count, one dynamic graph for all others"
    for count in (0, 1):  # sizes that the compiler always specialises on
        x = tokens(count)
        assert torch.equal(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["stacked", "list", "composed"])
def test_inductor_forward_and_backward(kind: str) -> None:
    layer = LAYERS[kind]()
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for count in COUNTS:
        assert_obeys_error_rule(compiled, layer, count)
    assert backend.frame_count == 1
    with torch.no_grad():
        for count in COUNTS:
            x = tokens(count)
            y, index = compiled(x)
            y_true = plain(copy.deepcopy(layer).double(), x.double(), index)
            testing.assert_accurate(y, plain(layer, x, index), y_true, f"without gradients, {count} tokens")
    assert backend.frame_count == 2, "one more graph: the one without gradients"


@pytest.mark.parametrize("kind", ["stacked", "list"])
def test_inductor_keeps_the_op_itself(kind: str) -> None:
    """With the routing given there is nothing for inductor to generate around the op: the same bits as eager."""
    layer = LAYERS[kind]()
    compiled = torch.compile(layer.experts, fullgraph=True, dynamic=True)
    for count in COUNTS[:2]:
        x = tokens(count)
        index = torch.stack([torch.randperm(E)[:K] for _ in range(count)])
        w = torch.rand(count, K)
        with torch.no_grad():
            assert torch.equal(compiled(x, index, w), layer.experts(x, index, w))


@pytest.mark.parametrize("kind", ["stacked", "list", "composed"])
def test_autocast(kind: str) -> None:
    layer = LAYERS[kind]()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for count in COUNTS:
        assert_obeys_error_rule(compiled, layer, count, autocast=True)
    assert backend.frame_count == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(tokens(5))[0].dtype == layer(tokens(5))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = StackedLayer(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in COUNTS[:2]:
        x = tokens(count, dtype)
        assert torch.equal(compiled(x)[0], layer(x)[0])


def captured(layer: StackedLayer, train: bool) -> tuple[dict[str, list], Tensor]:
    """The moe nodes of the graphs that the compiler was given, by op name."""
    nodes: dict[str, list] = {}

    def record(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        for node in graph.graph.nodes:
            if getattr(node.target, "namespace", None) in ("moe", "moe_ext"):
                nodes.setdefault(node.target._opname, []).append(node)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    x = tokens(7)
    if train:
        y = compiled(x.requires_grad_())[0]
        gradients(y, x, layer)
    else:
        with torch.no_grad():
            y = compiled(x)[0]
    return nodes, y


@pytest.mark.parametrize("kind", [StackedLayer, ListLayer])
def test_graph_without_gradients_holds_the_public_op(kind: type[StackedLayer]) -> None:
    nodes, _ = captured(kind(), train=False)
    assert list(nodes) == ["grouped_forward"] and len(nodes["grouped_forward"]) == 1


@pytest.mark.parametrize("kind", [StackedLayer, ListLayer])
def test_graph_of_training_computes_needed_gradients_only(kind: type[StackedLayer]) -> None:
    layer = kind()
    nodes, _ = captured(layer, train=True)
    assert set(nodes) == set(TRAIN)
    every_weight = nodes["_grouped_backward"][0].kwargs["needs"]
    torch._dynamo.reset()
    layer.requires_grad_(False)
    layer.router.requires_grad_(True)
    nodes, _ = captured(layer, train=True)
    assert set(nodes) == set(TRAIN)
    frozen = nodes["_grouped_backward"][0].kwargs["needs"]
    weights = Needs.GATE_UP | Needs.DOWN | (Needs.UP if kind is ListLayer else Needs(0))
    assert Needs(frozen) == Needs.HIDDEN_STATES | Needs.TOP_K_WEIGHTS
    assert Needs(every_weight) == Needs(frozen) | weights


def test_op_called_in_the_middle_of_a_model_without_graph_break() -> None:
    layer = StackedLayer()

    def model(x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.nn.functional.layer_norm(x + layer(x)[0], x.shape[-1:])
        return x

    explanation = torch._dynamo.explain(model)(tokens(4))
    assert explanation.graph_break_count == 0 and explanation.graph_count == 1

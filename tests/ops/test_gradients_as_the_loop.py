"""What a loop over the experts leaves behind, and the ops leave too: T104 None for experts without tokens, T105 the gradient of the
weights that the forward has read, T106 results of ops that nobody writes into.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext.experts import ExpertSpec, ListedWeights
from moe_ext.functional import grouped_experts
from moe_ext.integrations.run.peft import LoraProjection, LowRank

T, K, E, H, I = 6, 2, 5, 8, 6  # noqa: E741
BUSY = [True, False, True, False, False]


def expert_lists() -> list[list[Tensor]]:
    torch.manual_seed(0)
    shapes = ((I, H), (I, H), (H, I), (I,), (I,), (H,))
    return [[torch.randn(shape, requires_grad=True) for _ in range(E)] for shape in shapes]


def routing() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, H, requires_grad=True), torch.randint(0, 2, (T, K)) * 2, torch.rand(T, K)


@pytest.mark.parametrize("path", ["fused", "composed"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_T104_idle_experts_of_a_list_have_no_gradient(path: Any, create_graph: bool) -> None:
    gate, up, down, gate_bias, up_bias, down_bias = lists = expert_lists()
    weights = ListedWeights(up, down, gate, up_bias, down_bias, gate_bias)
    out = grouped_experts(*routing(), weights, ExpertSpec(), path=path)
    out.sum().backward(create_graph=create_graph)
    for tensors in lists:
        assert [t.grad is not None for t in tensors] == BUSY


def test_T104_idle_adapters_of_a_list_have_no_gradient() -> None:
    gate, up, down, *_ = expert_lists()
    factors = [[torch.randn(shape, requires_grad=True) for _ in range(E)] for shape in ((3, H), (I, 3))]
    on = LoraProjection([t.detach() for t in up], [LowRank(*factors, 2.0)])
    grouped_experts(*routing(), ListedWeights(on, down, gate)).sum().backward()
    for tensors in (*factors, gate, down):
        assert [t.grad is not None for t in tensors] == BUSY


def test_T104_idle_experts_of_a_stack_have_zeros() -> None:
    gate_up, down = torch.randn(E, 2 * I, H, requires_grad=True), torch.randn(E, H, I, requires_grad=True)
    torch.ops.moe.grouped_forward(*routing(), gate_up, down).sum().backward()
    for t in (gate_up, down):
        assert [bool(g.any()) for g in t.grad] == BUSY


def test_T104_idle_experts_have_zeros_in_a_graph() -> None:
    gate, up, down, *_ = expert_lists()
    run = torch.compile(lambda *a: torch.ops.moe.grouped_forward.list(*a), fullgraph=True, backend="aot_eager")
    run(*routing(), gate, up, down).sum().backward()
    for tensors in (gate, up, down):
        assert [t.grad is not None and bool(t.grad.any()) for t in tensors] == BUSY
        assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_T105_data_replaced_after_the_forward(is_list: bool, create_graph: bool) -> None:
    x, index, w = routing()
    stacks = [torch.randn(E, 2 * I, H), torch.randn(E, H, I)]

    def gradient(replace: bool) -> list[Tensor]:
        gate_up, down = stacks
        if is_list:
            gate, up = ([t.clone().requires_grad_() for t in half] for half in gate_up.chunk(2, 1))
            leaves = [*gate, *up, *(downs := [t.clone().requires_grad_() for t in down])]
            out = torch.ops.moe.grouped_forward.list(x, index, w, gate, up, downs)
        else:
            leaves = [t.clone().requires_grad_() for t in stacks]
            out = torch.ops.moe.grouped_forward(x, index, w, *leaves)
        if replace:
            for t in leaves:
                t.data = torch.full_like(t, float("nan"))
        return list(
            torch.autograd.grad(out.square().sum(), [x, *leaves], create_graph=create_graph, allow_unused=True, materialize_grads=True)
        )

    assert all(map(torch.equal, gradient(True), gradient(False)))


def test_T105_a_weight_written_in_place_after_the_forward_raises() -> None:
    gate_up, down = torch.randn(E, 2 * I, H, requires_grad=True), torch.randn(E, H, I, requires_grad=True)
    out = torch.ops.moe.grouped_forward(*routing(), gate_up, down)
    with torch.no_grad():
        down.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_T106_no_result_of_an_op_is_written_to() -> None:
    """Selective checkpointing keeps results of ops, and looks at their versions."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    gate, up, down, *_ = expert_lists()
    adapters = [LowRank(*([torch.randn(s, requires_grad=True) for _ in range(E)] for s in ((3, H), (I, 3))), 2.0) for _ in range(2)]
    x, index, w = routing()

    def run(x: Tensor) -> Tensor:
        return grouped_experts(x, index, w, ListedWeights(LoraProjection(up, adapters), down, gate))

    def keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return CheckpointPolicy.MUST_SAVE if "moe" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep))
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    assert torch.equal(found, expected)


def test_T108_hidden_states_changed_in_place_are_named() -> None:
    _, index, w = routing()
    leaf = torch.randn(T, H, requires_grad=True)
    gate_up, down = torch.randn(E, 2 * I, H, requires_grad=True), torch.randn(E, H, I, requires_grad=True)
    x = leaf * 1.0
    x += torch.ops.moe.grouped_forward(x, index, w, gate_up, down)
    with pytest.raises(RuntimeError, match=r"hidden_states was changed in place .* write x = x \+ experts\(x\)"):
        x.sum().backward()
    x = leaf * 1.0
    x += torch.ops.moe.grouped_forward(x, index, w, gate_up.detach(), down)  # where they are not read again, they may change
    x.sum().backward()

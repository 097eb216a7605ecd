"""Numbered traps that have bitten other implementations of expert layers, as far as they concern the ops; the number is in the
name. A trap that another file tests, or that cannot occur here, is a comment that says so. Those of the lifecycle and of models
are in test_traps_lifecycle.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ext import ops
from tests.helpers.op_table import ALL_LISTED, ALL_STACKED, LAYERS, Maker, layer, listed

fused, fused_list = torch.ops.moe.grouped_forward.default, torch.ops.moe.grouped_forward.list


def whole(dtype: torch.dtype = torch.float64, **sizes: Any) -> tuple[list[Any], dict[str, Any]]:
    """A layer on whole numbers, where any order of summation gives the same bits."""
    args, options = layer(activation="relu", **sizes)(Maker(dtype, "traps", integers=True))
    return list(args), options


def gradients(args: list[Any], options: dict[str, Any], grad: Tensor | None = None) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = fused(*leaves, **options)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return list(torch.autograd.grad(out, wanted, torch.ones_like(out) if grad is None else grad))


# ---- routing
def test_T09_ids_outside_the_experts_are_skipped_and_index_nothing() -> None:
    (x, ids, w, *weights), options = whole(ids="dropped")
    kept = (ids >= 0) & (ids < 6)
    assert kept.any() and not kept.all()
    instead = fused(x, ids.where(kept, 0), w * kept, *weights, **options)  # expert 0, with weight 0
    assert torch.equal(fused(x, ids, w, *weights, **options), instead)
    local = fused(x, ids - 2, w, *(None if t is None else t[2:5] for t in weights), **options)  # one rank's experts 2 to 4
    mine = (ids >= 2) & (ids < 5)
    assert torch.equal(local, fused(x, ids.where(mine, 6), w, *weights, **options))


def test_T11_the_same_expert_twice_in_one_token() -> None:
    (x, ids, w, *weights), options = whole(K=2, ids="repeated")
    assert torch.equal(ids[:, 0], ids[:, 1])
    assert torch.equal(fused(x, ids, w, *weights, **options), fused(x, ids[:, :1], w.sum(1, keepdim=True), *weights, **options))
    both = gradients([x, ids, w, *weights], options)
    once = gradients([x, ids[:, :1], w.sum(1, keepdim=True), *weights], options)
    assert torch.equal(both[1], once[1].expand(-1, 2)) and all(torch.equal(a, b) for a, b in zip(both[2:], once[2:], strict=True))


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_T12_routing_of_either_int_dtype_is_not_written_to(int_dtype: torch.dtype) -> None:
    args, options = whole(ids="dropped", bias=True)
    expected = fused(*args, **options)
    args[1] = args[1].to(int_dtype)
    before = [(None, 0) if t is None else (t.clone(), t._version) for t in args]
    assert torch.equal(fused(*args, **options), expected)
    gradients(args, options)
    assert all(t is None or (torch.equal(t, b) and t._version == v) for t, (b, v) in zip(args, before, strict=True))


# T10, T13: what `enable` does with other implementations of forward; not an op's business.


# ---- numerics
def _one_row_each(values: list[float], dtype: torch.dtype) -> Tensor:
    """A token whose k-th expert gives values[k]: relu(1) * value."""
    K = len(values)
    down = torch.tensor(values).view(K, 1, 1).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    return fused(one, torch.arange(K)[None], torch.ones(1, K), torch.ones(K, 1, 1, dtype=dtype), down, activation="relu", gated=False)


def test_T14_the_sum_over_top_k_runs_in_float32() -> None:
    assert _one_row_each([256, 1, 1], torch.bfloat16).item() == 258  # one at a time in bfloat16: 256
    assert _one_row_each([2048, 1, 1], torch.float16).item() == 2050


def test_T15_the_routing_weight_multiplies_the_rounded_row_in_float32() -> None:
    w = torch.tensor([[1 / 3]])
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    y = torch.tensor([[[1.7]]]).bfloat16()
    out = fused(one, torch.zeros(1, 1, dtype=torch.int64), w, torch.ones(1, 1, 1).bfloat16(), y, activation="relu", gated=False)
    assert out.item() == (y.float() * w).bfloat16().item()


def test_T16_float32_means_float32_whatever_the_matmul_precision() -> None:
    args, options = LAYERS["default"](Maker(torch.float32, "precision"))
    expected = fused(*args, **options)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(fused(*args, **options), expected)
    finally:
        torch.set_float32_matmul_precision(before)


# T17 router gradient: test_autograd.py::test_router_gradient_is_summed_in_float32, and determinism in test_op_table.py.


def test_T18_router_gradient_where_the_gate_and_the_weight_are_zero_and_with_a_down_bias() -> None:
    args, options = whole(bias=True)
    x, ids, w, gate_up, down, gate_up_bias, down_bias = args
    gate_up[:, :20], gate_up_bias[:, :20] = 0, 0  # relu(0) * up = 0: nothing to divide by
    w.zero_()
    _, dw, *_ = gradients(args, options)
    assert torch.equal(dw, down_bias.sum(1)[ids])  # <grad, 0 + bias>


def test_T19_empty_expert_grad_is_exactly_zero(dtype: torch.dtype) -> None:
    args, options = layer(bias=True, ids="one")(Maker(dtype, "empty"))
    for grad in gradients(list(args), options)[2:]:
        assert not grad[[0, 1, 2, 4, 5]].any() and grad[3].any()


@pytest.mark.parametrize("is_list", [False, True])
def test_T20_rows_past_the_last_expert_leak_into_nothing(is_list: bool) -> None:
    build = layer(bias=True, ids="dropped")
    args, options = (listed(build) if is_list else build)(Maker(torch.float32, "past"))
    train = torch.ops.moe_ext._grouped_forward_train.list if is_list else torch.ops.moe_ext._grouped_forward_train.default
    backward = torch.ops.moe_ext._grouped_backward.list if is_list else torch.ops.moe_ext._grouped_backward.default
    out, pre_act, *maps = train(*args, **options)
    used = int(maps[0][-1])
    assert used < len(pre_act) and not pre_act[used:].any() and out.isfinite().all()
    full: dict[str, Any] = {"activation": "silu", "gated": True, "alpha": None, "limit": None}
    if not is_list:
        full |= {"transposed": False, "interleaved": False}
    needs = int(ALL_LISTED if is_list else ALL_STACKED)

    def run() -> list[Tensor]:
        return backward(torch.ones_like(out), args[0], args[2], pre_act, *maps, *args[3:], **full, needs=needs)

    expected = run()
    pre_act[used:] = float("nan")
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(run(), expected, strict=True))


def test_T21_offsets_beyond_the_range_of_int32() -> None:
    """Two experts, and two tokens, more than 2^31 elements apart; the memory between them is never touched."""
    apart, N, K = 2**31 + 8, 3, 4
    try:
        memory = torch.empty(apart + N * K, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    weight, x = memory.as_strided((2, N, K), (apart, K, 1)), memory.as_strided((2, K), (apart, 1))
    values = Maker(torch.bfloat16, "far", integers=True).floats(2, N, K)
    weight.copy_(values)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    near = values[:, 0].contiguous()
    assert torch.equal(ops.grouped_mm(x, weight, offsets), ops.grouped_mm(near, values, offsets))
    _, r2s, s2r = ops.sort_by_expert(torch.tensor([[1], [0]]), 2)
    assert torch.equal(ops.permute(x, r2s, s2r, 1), near.flip(0))
    assert torch.equal(ops.grouped_mm_wgrad(x, x, offsets), ops.grouped_mm_wgrad(near, near, offsets))


# T22 transposed views: every layout of test_grouped_mm.py.


def test_T23_deterministic_algorithms_are_what_runs_anyway() -> None:
    args, options = LAYERS["default"](Maker(torch.bfloat16, "deterministic"))
    expected = gradients(list(args), options)
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients(list(args), options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# T24 stable sort: test_sort.py.


def test_T25_the_activation_does_not_overflow_float16_inside() -> None:
    pre_act = torch.tensor([[300.0, 0.5]], dtype=torch.float16)  # 300^2 = 90000 is infinite in float16, half of it is not
    assert ops.gated_activation(pre_act, activation="relu2").item() == torch.tensor(45000.0).half().item()
    x = torch.full((1, 2), 300.0, dtype=torch.float16)  # as are the two terms of this sum
    weight = torch.tensor([[[300.0, -299.0]]], dtype=torch.float16)
    assert ops.grouped_mm(x, weight, torch.tensor([0, 1], dtype=torch.int32)).item() == 300


def test_T26_no_test_of_an_op_has_a_tolerance() -> None:
    words = "|".join(("a" + "tol", "r" + "tol", "all" + "close", "assert_" + "close"))  # split: this file is searched too
    for path in sorted(Path(__file__).parents[1].rglob("test_*.py")):
        found = re.findall(rf"\b({words})\b", path.read_text())
        assert not found, f"{path.name} uses {found}: use moe_ext.testing.assert_accurate, or equality on whole numbers"


# ---- autograd
def test_T27_requires_grad_is_read_at_every_forward() -> None:
    (x, ids, w, gate_up, down, *rest), options = whole()
    down.requires_grad_()
    for frozen in (False, True, False):
        down.requires_grad_(not frozen)
        out = fused(x, ids, w, gate_up, down, *rest, **options)
        assert out.requires_grad == (not frozen)
        if not frozen:
            assert torch.autograd.grad(out.sum(), down)[0].any()


# T28: the ops take no 4-bit weights.
# T29, T30, T31: test_grouped_forward.py::test_exactly_the_needed_gradients_are_computed, test_frozen_weights_do_not_allocate_their_gradient
# T32: test_grouped_forward.py::test_without_gradients_nothing_is_kept
# T33: test_autograd.py::test_saved_shapes_do_not_depend_on_the_routing, test_checkpoint_accepts_a_replay_that_routes_otherwise
# T34: test_autograd.py::test_checkpoint_gives_identical_gradients[True]


@pytest.mark.parametrize("position", [0, 3, 4])
def test_T35_weights_changed_before_the_backward_are_an_error_and_not_a_wrong_gradient(position: int) -> None:
    args, options = whole()
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = fused(*leaves, **options)
    with torch.no_grad():
        leaves[position].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# T36: test_autograd.py::test_second_derivative_raises. T37: test_autograd.py::test_autocast_is_that_of_linear
# T38: test_grouped_forward.py, the list BAD; test_autograd.py::test_routing_weights_of_any_dtype
# T39: test_autograd.py::test_expanded_gradient_and_inputs_that_share_memory; the case "strided" of the table


@pytest.mark.parametrize(("T", "K", "E"), [(0, 2, 3), (1, 1, 1), (1, 3, 3), (5, 1, 3)])
def test_T40_smallest_sizes_have_gradients(T: int, K: int, E: int) -> None:
    args, options = whole(T=T, K=K, E=E, bias=True, ids="all")
    for grad, leaf in zip(gradients(args, options), [a for i, a in enumerate(args) if i != 1], strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype and (T > 0 or not grad.any())


# ---- weights, device
LISTS = {3: "gate_proj", 4: "up_proj", 5: "down_proj", 6: "gate_bias", 7: "up_bias", 8: "down_bias"}


@pytest.mark.parametrize("position", LISTS)
def test_T41_the_dtype_of_every_projection_of_every_expert_is_checked(position: int) -> None:
    args, options = listed(layer(bias=True))(Maker(torch.float32, "dtypes"))
    args[position][5] = args[position][5].half()
    with pytest.raises(RuntimeError, match=f"moe::grouped_forward: {LISTS[position]} is float16 but hidden_states is float32"):
        fused_list(*args, **options)


# T42, T43, T44: compute dtypes of 4-bit layers; plain weights of another dtype are T41.


@pytest.mark.parametrize("position", LISTS)
def test_T45_the_device_of_every_projection_is_checked(position: int) -> None:
    args, options = listed(layer(bias=True))(Maker(torch.float32, "devices"))
    args[position][5] = args[position][5].to("meta")
    with pytest.raises(RuntimeError, match="moe::grouped_forward: .* on different devices"):
        fused_list(*args, **options)


# T46, T49: hooks and sharded parameters are seen by `enable`. T47: the ops probe nothing. T48: streams are CUDA's.


@pytest.mark.parametrize("position", [6, 7, 8])
def test_T50_a_bias_on_any_one_projection_is_applied(position: int) -> None:
    args, options = listed(layer(bias=True, activation="relu"))(Maker(torch.float64, "biases", integers=True))
    without = (*args[:6], None, None, None)
    zeros = [[torch.zeros_like(b) for b in args[p]] for p in (6, 7, 8)]
    only = [list(args[p]) if p == position else z for p, z in zip((6, 7, 8), zeros, strict=True)]
    alone = [args[p] if p == position else None for p in (6, 7, 8)]
    with_bias = fused_list(*args[:6], *alone, **options)
    assert torch.equal(with_bias, fused_list(*args[:6], *only, **options))
    assert not torch.equal(with_bias, fused_list(*without, **options))


# ---- hosts
# T95: this suite runs without a GPU, and test_layering.py::test_import_loads_no_model_library_and_starts_no_gpu.


def test_T96_one_compiled_graph_serves_every_number_of_tokens() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    (x, ids, w, *weights), options = whole(T=23)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: fused(*a, **options), backend=counter, fullgraph=True, dynamic=True)
    for T in (23, 5, 11):
        tokens = [t[:T].clone() for t in (x, ids, w)]
        assert torch.equal(compiled(*tokens, *weights), fused(*tokens, *weights, **options))
    assert counter.frame_count == 1 and counter.op_count == 1


# T97: nothing is cached but the instruction set, read once and tested in test_isa.py. T98: test_traps_lifecycle.py.
# T99: test_layering.py::test_every_module_has_a_rank. T100: the functional path has no guards per expert in Python.

"""The layer among PyTorch's features: precision of the routing weights and of their gradient, autocast as for F.linear, both
checkpoint modes, second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_ext import ops
from moe_ext.functional import grouped_experts
from tests.helpers.op_table import LAYERS, Maker, layer, listed, spread
from tests.ops.test_grouped_forward import as_data, fused, fused_list, gradients, inputs, saved_by


# ---- precision of the routing weights
def test_router_gradient_is_summed_in_float32() -> None:
    I, H = 257, 4  # noqa: E741  (257 ones: bfloat16 would stop at 256)
    x = torch.zeros(1, H, dtype=torch.bfloat16)
    x[0, 0] = 1
    up, down = torch.zeros(1, I, H, dtype=torch.bfloat16), torch.zeros(1, H, I, dtype=torch.bfloat16)
    up[:, :, 0], down[:, 0] = 1, 1
    w = torch.full((1, 1), 1 + 2.0**-20, requires_grad=True)
    out = fused(x, torch.zeros(1, 1, dtype=torch.int64), w, up, down, activation="relu", gated=False)
    out[0, 0].backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and w.grad.item() == 257


@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_routing_weights_of_any_dtype(weights_dtype: torch.dtype, dtype: torch.dtype) -> None:
    args, options = layer(weights_dtype=weights_dtype)(Maker(dtype, "mixed"))
    out, _, dw, *_ = gradients(lambda *a: fused(*a, **options), args)
    assert out.dtype == dtype and dw.dtype == weights_dtype


# ---- autocast
def _under_autocast(function: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype):
        out = function(*leaves)
    return [out, *torch.autograd.grad(out.float().sum(), leaves)]


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_list", [False, True])
def test_autocast_is_that_of_linear(x_dtype: torch.dtype, autocast_dtype: torch.dtype, is_list: bool) -> None:
    weight_dtype = torch.float64 if x_dtype == torch.float64 else torch.float32
    (x, ids, w, gate_up, down, *biases), options = layer(bias=True)(Maker(weight_dtype, "autocast"))
    x, w = x.to(x_dtype), w.float()

    def ours(x: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
        if not is_list:
            return fused(x, ids, w, *weights, **options)
        gate_up, down, gate_up_bias, down_bias = weights
        (gate, up), (gate_bias, up_bias) = gate_up.chunk(2, 1), gate_up_bias.chunk(2, 1)
        return fused_list(x, ids, w, gate.unbind(), up.unbind(), down.unbind(), gate_bias.unbind(), up_bias.unbind(), down_bias.unbind())

    new = _under_autocast(ours, autocast_dtype, x, w, gate_up, down, *biases)
    linear = _under_autocast(F.linear, autocast_dtype, x, gate_up[0], biases[0][0])
    assert [t.dtype for t in (new[0], new[1], new[3], new[5])] == [t.dtype for t in (linear[0], linear[1], linear[2], linear[3])]
    assert new[2].dtype == torch.float32
    inner = torch.float64 if x_dtype == torch.float64 else autocast_dtype
    by_hand = fused(x.to(inner), ids, w, *(t.to(inner) for t in (gate_up, down, *biases)), **options)
    assert torch.equal(new[0], by_hand)  # with float32 routing weights: they are not rounded


def test_autocast_of_the_composed_path_gives_the_same_bits() -> None:
    args, options = layer(bias=True)(Maker(torch.float32, "autocast"))
    routing, weights, spec = as_data(args, options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_experts(*routing, weights, spec, path="composed"), grouped_experts(*routing, weights, spec))


# ---- autograd
@pytest.mark.parametrize("is_list", [False, True])
def test_second_derivative_raises(is_list: bool) -> None:
    """It raised once; it is computed now (test_derivatives.py). What raises is an internal op, which has no gradient at all."""
    build = LAYERS["default"]
    args, options = (listed(build) if is_list else build)(Maker(torch.float64, "double"))
    x = args[0].requires_grad_()
    (grad,) = torch.autograd.grad((fused_list if is_list else fused)(*args, **options).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.abs().sum() > 0
    train = torch.ops.moe_ext._grouped_forward_train
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        (train.list if is_list else train.default)(*args, **options)


def test_second_derivative_of_a_primitive_raises() -> None:
    """It raised once; it is computed now."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ops.gated_activation, [x])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_identical_gradients(use_reentrant: bool) -> None:
    args, options = inputs("ungated_relu2", torch.bfloat16)
    expected = gradients(lambda *a: fused(*a, **options), args)
    found = gradients(lambda *a: fused(*a, **options), args)
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    out = checkpoint(lambda *a: fused(*a, **options), *leaves, use_reentrant=use_reentrant)
    grad = Maker(torch.float32, "grad").floats(*out.shape).bfloat16().to(out.dtype)
    out.backward(grad)
    found = [out.detach(), *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_saved_shapes_do_not_depend_on_the_routing() -> None:
    shapes = []
    for kind in ("random", "one", "dropped", "sparse"):
        args, options = layer(ids=kind)(Maker(torch.float32, kind))
        x = args[0].requires_grad_()
        _, kept = saved_by(lambda x=x, rest=args[1:], options=options: fused(x, *rest, **options))
        shapes.append([t.shape for t in kept])
    assert all(s == shapes[0] for s in shapes)


def test_checkpoint_accepts_a_replay_that_routes_otherwise() -> None:
    args, options = layer()(Maker(torch.float32, "replay"))
    routings = iter([args[1], args[1].flip(0)])
    x = args[0].requires_grad_()
    checkpoint(lambda x: fused(x, next(routings), *args[2:], **options), x, use_reentrant=False).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_expanded_gradient_and_inputs_that_share_memory() -> None:
    args, options = layer()(Maker(torch.float64, "shared", integers=True))
    options = {"activation": "relu"}
    x = args[0].requires_grad_()
    (from_sum,) = torch.autograd.grad(fused(*args, **options).sum(), x)  # its gradient is one number with strides 0
    (from_ones,) = torch.autograd.grad(fused(*args, **options), x, torch.ones_like(x))
    (from_columns,) = torch.autograd.grad(fused(*args, **options), x, spread(torch.ones_like(x)))
    assert torch.equal(from_sum, from_ones) and torch.equal(from_columns, from_ones)

"""The activations: exact where arithmetic is, as torch at the edges (clamps, infinities, NaN, huge values), and in float64
compared with extended precision. Formulas: moe_ext.reference.activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_ext import ops
from moe_ext.testing import ERROR_RATIO, assert_accurate
from tests.helpers.op_table import ACTIVATIONS, Maker, spread
from tests.helpers.plain_ops import gated_activation, gated_activation_backward

activations = pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in ACTIVATIONS.items()])
backward = torch.ops.moe_ext.gated_activation_backward


def columns(I: int, options: dict[str, Any]) -> int:  # noqa: E741
    return I * 2 if options.get("gated", True) else I


def extended(pre_act: torch.Tensor, options: dict[str, Any]) -> np.ndarray:
    """The formulas once more, in the widest float of the machine."""
    x = pre_act.numpy().astype(np.longdouble)
    one, half, pi = np.longdouble(1), np.longdouble(0.5), np.arctan(np.longdouble(1)) * 4

    def erf(v: np.ndarray) -> np.ndarray:  # a series of positive terms: nothing cancels
        term = 2 / np.sqrt(pi) * np.exp(-v * v) * v
        total = term.copy()
        for n in range(1, 200):
            term = term * 2 * v * v / (2 * n + 1)
            total += term
        return total

    act = {
        "silu": lambda g: g / (one + np.exp(-g)),
        "gelu": lambda g: half * g * (one + erf(g / np.sqrt(np.longdouble(2)))),
        "gelu_tanh": lambda g: half * g * (one + np.tanh(np.sqrt(2 / pi) * (g + np.longdouble("0.044715") * g**3))),
        "relu": lambda g: np.maximum(g, 0),
        "relu2": lambda g: np.maximum(g, 0) ** 2,
        "swigluoai": lambda g: g / (one + np.exp(-options["alpha"] * g)),
    }[options.get("activation", "silu")]
    if not options.get("gated", True):
        return act(x)
    gate, up = (x[:, 0::2], x[:, 1::2]) if options.get("interleaved") else np.split(x, 2, axis=1)
    if "limit" in options:
        gate, up = np.minimum(gate, options["limit"]), np.clip(up, -options["limit"], options["limit"])
    return act(gate) * (up + (1 if options.get("activation") == "swigluoai" else 0))


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="numpy has no wider float than float64 here")
@activations
def test_float64_against_extended_precision(options: dict[str, Any]) -> None:
    pre_act = Maker(torch.float64, "extended").floats(40, columns(33, options))
    truth = extended(pre_act, options)

    def error(values: Any) -> float:
        return float(np.sqrt(((np.asarray(values, dtype=np.longdouble) - truth) ** 2).sum()))

    new, plain = (error(f(pre_act, **options).numpy()) for f in (ops.gated_activation, gated_activation))
    assert new <= ERROR_RATIO * max(plain, error(truth.astype(np.float64))), (new, plain)


@pytest.mark.parametrize("I", [1, 63, 64, 65, 130])  # around the kernels' block of columns
@activations
def test_every_width_obeys_the_error_rule(options: dict[str, Any], I: int) -> None:  # noqa: E741
    for dtype in (torch.float32, torch.bfloat16):
        m = Maker(dtype, f"width{I}")
        S = 130 // I + 3
        pre_act, grad = m.floats(S, columns(I, options)), m.floats(S, I)
        new, plain = ops.gated_activation(pre_act, **options), gated_activation(pre_act, **options)
        assert_accurate(new, plain, gated_activation(pre_act.double(), **options), f"{dtype}")
        new, plain = backward(grad, pre_act, **options), gated_activation_backward(grad, pre_act, **options)
        assert_accurate(new, plain, gated_activation_backward(grad.double(), pre_act.double(), **options), f"{dtype} backward")


def edge_values(dtype: torch.dtype) -> torch.Tensor:
    huge = torch.finfo(dtype).max
    finite = [0.0, 1e-3, 0.5, 1.0, 3.0, 20.0, 80.0, 100.0, 1000.0, 60000.0, huge**0.5, huge / 4, huge]
    return torch.tensor([s * v for v in finite for s in (1, -1)] + [float("inf"), -float("inf"), float("nan")]).to(dtype)


def edge_rows(dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    """One row per edge value of the gate; its columns hold every edge value of up. Ungated: one value per row."""
    values = edge_values(dtype)
    if not options.get("gated", True):
        return values[:, None]
    # float64 has no wider truth: where torch's gelu_tanh cancels to 0 and the truth is 1e-261, a huge up would tell them apart
    up = values if dtype != torch.float64 else torch.tensor([0.25, -3.0, float("nan")], dtype=dtype)
    gate, up = values[:, None].expand(-1, len(up)), up.expand(len(values), -1)
    return torch.stack((gate, up), -1).flatten(1) if options.get("interleaved") else torch.cat((gate, up), 1)


def agree_at_the_edges(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """NaN, infinity and zero where torch has them or float64 does; the rest by the error rule on relative errors, so that no large
    value hides a small one. Below the smallest normal number of float32, in which the sums run, there is only zero."""
    tiny = torch.finfo(torch.float32).tiny
    n, p, t = (torch.where(v.abs() < tiny, torch.zeros((), dtype=v.dtype), v).flatten() for v in (new, plain, truth))
    rounded = t.to(n.dtype)
    for special in (torch.isnan, torch.isposinf, torch.isneginf, lambda v: v == 0):
        wrong = (special(n) != special(p)) & (special(n) != special(rounded))
        assert not wrong.any(), f"{n[wrong]}, plain PyTorch {p[wrong]}, truth {t[wrong]}"
    both = n.isfinite() & p.isfinite() & rounded.isfinite() & (n != 0) & (p != 0) & (rounded != 0)
    if new.dtype != torch.float64:  # whose truth is compared in test_float64_against_extended_precision
        ratios = [v[both].double() / t[both] - 1 for v in (n, p, rounded)]
        assert ratios[0].norm() <= ERROR_RATIO * max(ratios[1].norm(), ratios[2].norm())


@activations
def test_edge_values(dtype: torch.dtype, options: dict[str, Any]) -> None:
    pre_act = edge_rows(dtype, options)
    truth = gated_activation(pre_act.double(), **options)
    agree_at_the_edges(ops.gated_activation(pre_act, **options), gated_activation(pre_act, **options), truth)


@activations
def test_gradient_at_edge_values(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Finite edges of the gate, up moderate: beyond that, 0 * inf is NaN or not by the order in which three factors are multiplied."""
    gate = edge_values(dtype)[:-5]
    if options.get("gated", True):
        up = torch.tensor([0.25, -3.0], dtype=dtype).repeat(len(gate) // 2)
        pre_act = torch.stack((gate, up), 1)
    else:
        pre_act = gate[:, None]
    grad = torch.ones(len(gate), 1, dtype=dtype)
    truth = gated_activation_backward(grad.double(), pre_act.double(), **options)
    agree_at_the_edges(backward(grad, pre_act, **options), gated_activation_backward(grad, pre_act, **options), truth)


@activations
def test_nan_reaches_result_and_gradient(dtype: torch.dtype, options: dict[str, Any]) -> None:
    pre_act = torch.full((3, columns(5, options)), float("nan"), dtype=dtype)
    assert ops.gated_activation(pre_act, **options).isnan().all()
    if "limit" not in options and not options.get("activation", "").startswith("relu"):
        assert backward(torch.ones(3, 5, dtype=dtype), pre_act, **options).isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_exactly_at_the_clamp_the_gradient_passes(dtype: torch.dtype, interleaved: bool) -> None:
    eps = torch.finfo(dtype).eps
    values = torch.tensor([1 - eps, 1, 1 + eps, -1 + eps, -1, -1 - eps], dtype=dtype)
    gate, up = values[:, None].expand(-1, 6), values.expand(6, -1)
    pre_act = torch.stack((gate, up), -1).flatten(1) if interleaved else torch.cat((gate, up), 1)
    options: dict[str, Any] = {"activation": "relu", "limit": 1.0, "interleaved": interleaved}
    grad = torch.ones(6, 6, dtype=dtype)
    assert torch.equal(ops.gated_activation(pre_act, **options), gated_activation(pre_act, **options))
    found = backward(grad, pre_act, **options)
    assert torch.equal(found, gated_activation_backward(grad, pre_act, **options))
    d_gate, d_up = (found[:, 0::2], found[:, 1::2]) if interleaved else found.chunk(2, 1)
    assert d_gate[1, 0] != 0 and d_gate[2, 0] == 0 and d_up[0, 1] != 0 and d_up[0, 2] == 0 and d_up[0, 4] != 0 and d_up[0, 5] == 0


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai"])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_interleaved_is_a_permutation_of_columns(dtype: torch.dtype, activation: str, limit: float | None) -> None:
    options = {"activation": activation, "alpha": 1.7 if activation == "swigluoai" else None, "limit": limit}
    m = Maker(dtype, activation)
    halves, grad = m.floats(5, 2 * 70), m.floats(5, 70)
    alternating = halves.unflatten(1, (2, 70)).mT.flatten(1)
    assert torch.equal(ops.gated_activation(alternating, **options, interleaved=True), ops.gated_activation(halves, **options))
    d = backward(grad, halves, **options)
    assert torch.equal(backward(grad, alternating, **options, interleaved=True), d.unflatten(1, (2, 70)).mT.flatten(1))


def test_layouts_are_read_as_they_are(dtype: torch.dtype) -> None:
    m = Maker(dtype)
    pre_act, grad = m.floats(7, 20), m.floats(7, 10)
    out, d = ops.gated_activation(pre_act), backward(grad, pre_act)
    for p in (spread(pre_act), pre_act.T.contiguous().T):
        assert torch.equal(ops.gated_activation(p), out) and torch.equal(backward(spread(grad), p), d)
    assert torch.equal(backward(grad[:1].expand(7, 10), pre_act), backward(grad[:1].repeat(7, 1), pre_act))


@activations
def test_no_rows(options: dict[str, Any]) -> None:
    pre_act = torch.empty(0, columns(8, options))
    assert ops.gated_activation(pre_act, **options).shape == (0, 8)
    assert backward(torch.empty(0, 8), pre_act, **options).shape == pre_act.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "mish"}, "activation='mish' is not known; choose one of silu, gelu, gelu_tanh, relu, relu2, swigluoai"),
        ({"activation": "swigluoai"}, r"activation='swigluoai' needs alpha \(gpt-oss uses 1.702\)"),
        ({"activation": "swigluoai", "alpha": 1.5, "gated": False}, "it needs gated=True"),
        ({"alpha": 1.5}, "alpha=1.5 has no meaning for activation='silu'"),
        ({"limit": -2.0}, "limit=-2 needs gated=True and a positive value"),
        ({"limit": 2.0, "gated": False}, "limit=2 needs gated=True and a positive value"),
        ({"interleaved": True, "gated": False}, "interleaved=True means gate and up alternate: it needs gated=True"),
    ],
)
def test_option_errors_have_the_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"moe_ext::gated_activation: .*{message}"):
        ops.gated_activation(torch.zeros(2, 4), **options)
    with pytest.raises(RuntimeError, match=message):
        backward(torch.zeros(2, 4 if options.get("gated") is False else 2), torch.zeros(2, 4), **options)


def test_shape_errors_have_the_values() -> None:
    with pytest.raises(RuntimeError, match="pre_act has 5 columns; gated=True needs gate and up, 2I"):
        ops.gated_activation(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"pre_act has shape \[4\], expected \[S, 2I\]"):
        ops.gated_activation(torch.zeros(4))
    with pytest.raises(RuntimeError, match="pre_act is int64; float64, float32, bfloat16 and float16 are supported"):
        ops.gated_activation(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"grad has shape \[2, 4\], expected \[2, 2\]"):
        backward(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="grad is float64 but pre_act is float32"):
        backward(torch.zeros(2, 2).double(), torch.zeros(2, 4))

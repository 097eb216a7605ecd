"""Second derivatives, tangents and transforms of `torch.func`, of every op and layout: what plain PyTorch computes, by the error rule.

T101 a second derivative is silently zero where the incoming gradient needs none. T102 tangents are dropped. T103 a transform of
`torch.func`, or a batch of gradients, that plain PyTorch has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_ext.testing import assert_accurate
from tests.helpers.error_rule import ENOUGH_NUMBERS
from tests.helpers.op_table import CASES, GPT_OSS, Case, Maker, layer, listed, tensors, to_double

NOT_SECOND = ("strided", "expanded", "long", "one_expert_of_many", "k_is_e")  # the same formula on more, or on shared, memory
NO_ROWS = ("no_tokens", "all_dropped", "tiny_bias")  # plain PyTorch has no graph there
SECOND = [c for c in CASES if c.entry.differentiable and c.label not in NOT_SECOND + NO_ROWS]
GRADIENTS = ("grouped_mm_wgrad.list", "grouped_bias_grad", "gated_activation_backward", "unpermute_backward")
SMALL: dict[str, Any] = {"T": 9, "K": 2, "E": 4, "H": 10, "I": 6}
LAYERS = {
    "default": layer(**SMALL), "bias_dropped": layer(**SMALL, bias=True, ids="dropped"), "gpt_oss": layer(**(GPT_OSS | SMALL)),
    "gelu": layer(**SMALL, activation="gelu"), "gelu_tanh_transposed": layer(**SMALL, activation="gelu_tanh", transposed=True),
    "ungated": layer(**SMALL, activation="relu2", gated=False, bias=True), "recompute": layer(**SMALL, bias=True, recompute=True),
}  # fmt: skip
LISTED = {f"listed_{name}": listed(LAYERS[name]) for name in ("default", "bias_dropped", "ungated", "recompute")}
BUILDS = {**LAYERS, **LISTED}
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def case_of(name: str) -> Case:
    return Case("grouped_forward.list" if name in LISTED else "grouped_forward", "default")


def arguments(name: str, dtype: torch.dtype, draw: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return BUILDS[name](Maker(dtype, f"{name}/{draw}"))


def flat_function(
    case: Case, function: Callable[..., Any], args: Any, options: dict[str, Any]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`function` of its differentiable tensors alone, lists spliced in, and these."""
    leaves = [t for i in case.entry.differentiable if i < len(args) for t in tensors(args[i])]

    def of_leaves(*given: Tensor) -> Tensor:
        left = iter(given)
        new = [
            (None if a is None else next(left) if isinstance(a, Tensor) else [next(left) for _ in a])
            if i in case.entry.differentiable else a
            for i, a in enumerate(args)
        ]  # fmt: skip
        result = function(*new, **options)
        return result if isinstance(result, Tensor) else torch.cat([r.flatten() for r in result])

    of_leaves.__name__ = "of_moe" if function is case.function else "of_plain"
    return of_leaves, leaves


def compare(case: Case, inputs: Callable[[int], tuple[Any, dict[str, Any]]], measure: Callable[..., list[Tensor]]) -> None:
    """measure(function, leaves) of the op, by the error rule, on as many draws of inputs as `check_error_rule` takes."""

    def draw(number: int) -> list[list[Tensor]]:
        args, options = inputs(number)
        plain = {name: value for name, value in options.items() if name != "recompute"}
        reference = case.entry.reference
        of = ((case.function, args, options), (reference, args, plain), (reference, to_double(args), plain))
        return [measure(*flat_function(case, *one)) for one in of]

    draws = [draw(0)]
    groups: dict[Any, list[int]] = {}
    for i, t in enumerate(draws[0][0]):
        groups.setdefault(t.shape if case.op.endswith(".list") else i, []).append(i)
    smallest = min((n for g in groups.values() if (n := sum(draws[0][0][i].numel() for i in g))), default=ENOUGH_NUMBERS)
    draws += [draw(number) for number in range(1, -(-2 * ENOUGH_NUMBERS // smallest))]  # errors of errors: twice as many
    for group in groups.values():
        new, plain, truth = (torch.cat([d[which][i].flatten() for d in draws for i in group]) for which in range(3))
        assert_accurate(new, plain.to(new.dtype), truth, f"{case} result {group[0]}")


def penalty(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The gradient of sum(f) + |grad sum(f)|^2: the incoming gradient of the first backward needs none itself."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves).sum()
    grads = torch.autograd.grad(out, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return list(torch.autograd.grad(out + sum(g.square().sum() for g in grads), leaves, allow_unused=True, materialize_grads=True))


def product_with_hessian(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    vectors = [Maker(torch.float32, f"v{i}").floats(*t.shape).to(t.dtype) for i, t in enumerate(leaves)]
    return list(torch.autograd.functional.hvp(lambda *a: function(*a).square().sum(), tuple(leaves), tuple(vectors))[1])


def tangent(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, Maker(torch.float32, f"v{i}").floats(*t.shape).to(t.dtype)) for i, t in enumerate(leaves)]
        found = forward_ad.unpack_dual(function(*duals)).tangent
        assert found is not None
        return [found]


# ---- second derivatives
@LOW
@pytest.mark.parametrize("measure", [penalty, product_with_hessian])
@pytest.mark.parametrize("name", BUILDS)
def test_T101_second_derivatives_of_the_layer(name: str, measure: Any, dtype: torch.dtype) -> None:
    compare(case_of(name), lambda draw: arguments(name, dtype, draw), measure)


@pytest.mark.parametrize("case", SECOND, ids=str)
def test_T101_second_derivatives_of_every_op(case: Case) -> None:
    compare(case, lambda draw: case.inputs(torch.float32, draw=draw), penalty)


@pytest.mark.parametrize("name", BUILDS)
def test_T101_gradgradcheck(name: str) -> None:
    function, leaves = flat_function(case_of(name), case_of(name).function, *arguments(name, torch.float64))
    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in leaves], fast_mode=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.op in GRADIENTS], ids=str)
def test_T101_ops_that_are_gradients_have_gradients(case: Case) -> None:
    args, options = case.inputs(torch.float64)
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]

    def function(*leaves: Tensor) -> Any:
        values = dict(zip(floats, leaves, strict=True))
        return tuple(tensors(case.function(*(values.get(i, a) for i, a in enumerate(args)), **options)))

    leaves = [args[i].requires_grad_() for i in floats]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (2,), (0, 2), (3,), (4,), (3, 4), (5,), (0, 4)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_T101_second_derivatives_of_some_inputs(needed: tuple[int, ...], recompute: bool) -> None:
    """What needs no gradient is not kept, and is not missed: with frozen weights not even the hidden states."""
    args, options = arguments("bias_dropped", torch.float64)

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(needed, leaves, strict=True))
        return case_of("default").function(*(given.get(i, a) for i, a in enumerate(args)), **options, recompute=recompute)

    assert torch.autograd.gradgradcheck(function, [args[i].requires_grad_() for i in needed], fast_mode=True)


def test_T101_third_derivative_and_inputs_that_depend_on_each_other() -> None:
    case = case_of("default")

    def third(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        x = leaves[0].detach().requires_grad_()
        value = function(x, leaves[1] * x[:, :1].exp(), *leaves[2:]).square().sum()
        for _ in range(2):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().mean()
        return [torch.autograd.grad(value, x)[0]]

    compare(case, lambda draw: arguments("default", torch.float32, draw), third)


@pytest.mark.parametrize("name", ["no_tokens", "all_dropped"])
@pytest.mark.parametrize("measure", [penalty, product_with_hessian, tangent])
def test_T101_T102_without_rows_all_is_zero(name: str, measure: Any) -> None:
    case = Case("grouped_forward", name)
    args, options = case.inputs(torch.float64)
    for t in measure(*flat_function(case, case.function, args, options)):
        assert not t.any()


# ---- tangents
@LOW
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("no_grad", [False, True])
def test_T102_tangents_of_the_layer(name: str, dtype: torch.dtype, no_grad: bool) -> None:
    with torch.set_grad_enabled(not no_grad):
        compare(case_of(name), lambda draw: arguments(name, dtype, draw), tangent)


@pytest.mark.parametrize("case", SECOND, ids=str)
def test_T102_tangents_of_every_op(case: Case) -> None:
    compare(case, lambda draw: case.inputs(torch.float32, draw=draw), tangent)


@pytest.mark.parametrize("position", range(6))
def test_T102_a_tangent_of_one_input_where_all_need_gradients(position: int) -> None:
    def measure(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        with forward_ad.dual_level():
            leaves[position] = forward_ad.make_dual(leaves[position], torch.ones_like(leaves[position]))
            return [forward_ad.unpack_dual(function(*leaves)).tangent]

    compare(case_of("default"), lambda draw: arguments("bias_dropped", torch.float32, draw), measure)


def test_T102_a_tangent_of_the_incoming_gradient() -> None:
    """Forward over reverse: the gradient that flows into the backward has a tangent, and nothing else has."""

    def measure(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        x = leaves[0].detach().requires_grad_()
        out = function(x, *leaves[1:])
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(out), out.detach())
            return [forward_ad.unpack_dual(torch.autograd.grad(out, x, grad)[0]).tangent]

    compare(case_of("default"), lambda draw: arguments("ungated", torch.float32, draw), measure)


# ---- transforms
def scalar(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).square().sum()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(scalar(function)(x), x)[0]


def both(x: Tensor) -> Tensor:
    return torch.stack([x, x.cos()])


_F = torch.func
#: What `torch.func` does with a function, and the same without it.
TRANSFORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "grad": (lambda f, x: _F.grad(scalar(f))(x), gradient),
    "jacrev": (lambda f, x: _F.jacrev(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "jacfwd": (lambda f, x: _F.jacfwd(f)(x), lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "hessian": (lambda f, x: _F.hessian(scalar(f))(x), lambda f, x: torch.autograd.functional.hessian(scalar(f), x)),
    "reverse_over_reverse": (
        lambda f, x: _F.jacrev(_F.jacrev(scalar(f)))(x), lambda f, x: torch.autograd.functional.hessian(scalar(f), x),
    ),
    "vjp_of_a_batch": (
        lambda f, x: _F.vmap(_F.vjp(f, x)[1])(both(x))[0],
        lambda f, x: torch.stack([torch.autograd.functional.vjp(f, x, v)[1] for v in both(x)]),
    ),
    "per_sample": (lambda f, x: _F.vmap(_F.grad(scalar(f)))(both(x)), lambda f, x: torch.stack([gradient(f, v) for v in both(x)])),
    "jvp_of_grad": (
        lambda f, x: _F.jvp(_F.grad(scalar(f)), (x,), (x.sin(),))[1],
        lambda f, x: torch.autograd.functional.hvp(scalar(f), x, x.sin())[1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", BUILDS)
def test_T103_transforms_of_the_layer(name: str, transform: str) -> None:
    ours, plain = TRANSFORMS[transform]

    def measure(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        run = ours if function.__name__ == "of_moe" else plain
        return [run(lambda x: function(x, *leaves[1:]), leaves[0])]

    compare(case_of(name), lambda draw: arguments(name, torch.float32, draw), measure)


def test_T103_vmap_over_tokens_and_routing_and_weights() -> None:
    args, options = arguments("bias_dropped", torch.float32)
    function = case_of("default").function
    batches = [torch.stack([a, a.flip(0)]) for a in args]
    new = torch.func.vmap(lambda *a: function(*a, **options))(*batches)
    plain, truth = (torch.stack([function(*(b[i] for b in bs), **options) for i in range(2)]) for bs in (batches, to_double(batches)))
    assert_accurate(new, plain, truth)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("again", [False, True])
def test_T103_a_batch_of_gradients(name: str, again: bool) -> None:
    """The same bits as one gradient after the other; where they are to be differentiated again, the same by the error rule."""
    case = case_of(name)

    def measure(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = function(*leaves)
        grads = Maker(torch.float32, "batch").floats(3, *out.shape).to(out.dtype)
        zeros = {"allow_unused": True, "materialize_grads": True}  # plain PyTorch leaves out experts without tokens
        one_by_one = [torch.autograd.grad(out, leaves, g, retain_graph=True, **zeros) for g in grads]
        found = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
        if function.__name__ != "of_moe":
            return found
        new = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True, create_graph=again, **zeros)
        # What is materialised for a tensor without a gradient, an idle expert, has no dimension for the batch.
        new = [n.expand_as(f) if n.dim() < f.dim() and not n.any() else n for n, f in zip(new, found, strict=True)]
        assert again or all(map(torch.equal, new, found))
        return new

    compare(case, lambda draw: arguments(name, torch.float32, draw), measure)


@pytest.mark.parametrize("case", SECOND, ids=str)
def test_T103_gradients_of_every_op(case: Case) -> None:
    def measure(function: Any, leaves: list[Tensor]) -> list[Tensor]:
        if function.__name__ == "of_moe":
            return list(torch.func.grad(lambda ts: function(*ts).square().sum())(tuple(leaves)))
        leaves = [t.detach().requires_grad_() for t in leaves]
        return list(torch.autograd.grad(function(*leaves).square().sum(), leaves, allow_unused=True, materialize_grads=True))

    compare(case, lambda draw: case.inputs(torch.float32, draw=draw), measure)


def test_T103_autocast_inside_a_transform() -> None:
    args, options = arguments("bias_dropped", torch.float32)
    function = case_of("default").function
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.func.vjp(lambda x: function(x, *args[1:], **options), args[0])[0]
        expected = function(*args, **options)
    assert out.dtype == torch.bfloat16
    assert_accurate(out, expected, expected.double())

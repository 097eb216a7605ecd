"""Every op once more, as steps that PyTorch differentiates any number of times, forwards and backwards, and batches (`torch.func`).

They run where the ops' own kernels have no answer: for a second derivative, for inputs with tangents, inside transforms of
`torch.func`. Products run on the kernels (`Product`, `WeightGrad`); the rest is plain PyTorch, summed in float32 (float64 for float64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import reference
from .experts import ExpertSpec

moe = torch.ops.moe
moe_ext = torch.ops.moe_ext

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Inside, an op is its kernel: neither its gradient nor its autocast rule is looked for."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        yield


def each_of_a_batch(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`autograd.grad(is_grads_batched=True)` has a batching of its own, older than `torch.func`, that knows no rules of ours: a backward
    with this decorator runs for one gradient after the other."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        is_batch = [g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads]
        if not any(is_batch):
            return backward(ctx, *grads)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        plain: list[Any] = [torch._remove_batch_dim(g, level, 1, 0) if b else g for g, b in zip(grads, is_batch, strict=True)]
        count = next(g.shape[0] for g, b in zip(plain, is_batch, strict=True) if b)
        results = [backward(ctx, *(g[i] if b else g for g, b in zip(plain, is_batch, strict=True))) for i in range(count)]
        return tuple(None if r[0] is None else torch._add_batch_dim(torch.stack(r), 0, level) for r in zip(*results, strict=True))

    return wrapped


def without_idle(grads: Sequence[Tensor | None], expert_offsets: Tensor) -> list[Tensor | None]:
    """The gradients of experts with one tensor each: None for those without rows, as a loop over the experts that have rows leaves it.

    In a graph the number of gradients is fixed: there, and while CUDA captures one, they stay zeros. On CUDA this waits for the GPU.
    """
    if type(expert_offsets) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return list(grads)
    if get_proxy_mode() is not None or (expert_offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return list(grads)
    starts = expert_offsets.tolist()
    return [g if end > start else None for g, start, end in zip(grads, starts, starts[1:], strict=False)]


# ----------------------------------------------------------------------------------------------------------------------- products
class Product(torch.autograd.Function):
    """apply(x, expert_offsets, transposed, experts, *weight_and_bias): `grouped_mm`. experts: 0 for stacks, else E for lists."""

    @staticmethod
    def forward(x: Tensor, expert_offsets: Tensor, transposed: bool, experts: int, *tensors: Tensor) -> Tensor:
        with kernels_only():
            if not experts:
                weight, *bias = tensors
                return moe_ext.grouped_mm.default(x, weight, expert_offsets, bias[0] if bias else None, transposed=transposed)
            return moe_ext.grouped_mm.list(x, tensors[:experts], expert_offsets, tensors[experts:] or None, transposed=transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, expert_offsets, ctx.transposed, ctx.experts, *tensors = inputs
        count = ctx.experts or 1
        ctx.biased, ctx.shape = len(tensors) > count, x.shape
        trained = any(ctx.needs_input_grad[4 : 4 + count])
        ctx.save_for_backward(x if trained else None, expert_offsets, *tensors[:count])
        ctx.save_for_forward(x, expert_offsets, *tensors[:count])

    @staticmethod
    @each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, expert_offsets, *weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = Product.apply(grad, expert_offsets, not ctx.transposed, ctx.experts, *weight) if needs[0] else None
        grads: list[Tensor | None] = [None] * (len(needs) - 4)
        count = len(weight)
        if any(needs[4 : 4 + count]):
            a, b = (x, grad) if ctx.transposed else (grad, x)
            if ctx.experts:  # with memory of its own for each
                grads[:count] = without_idle(moe_ext.grouped_mm_wgrad.list(a, b, expert_offsets), expert_offsets)
            else:
                grads[0] = moe_ext.grouped_mm_wgrad.default(a, b, expert_offsets)
        if any(needs[4 + count :]):
            found = moe_ext.grouped_bias_grad.default(grad, expert_offsets)
            grads[count:] = without_idle(found.unbind(), expert_offsets) if ctx.experts else [found]
        return grad_x, None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, *rest: Any) -> Tensor:
        x, expert_offsets, *weight = ctx.saved_tensors
        tangents = rest[3:]
        count = len(weight)
        options = (expert_offsets, ctx.transposed, ctx.experts)
        parts = [] if x_tangent is None else [Product.apply(x_tangent, *options, *weight)]
        if any(t is not None for t in tangents):
            turned = [_or_zeros(t, w) for t, w in zip(tangents[:count], weight, strict=True)]
            biases = tangents[count:]
            if any(t is not None for t in biases):
                like = next(t for t in biases if t is not None)
                turned += [_or_zeros(t, like) for t in biases]
            parts.append(Product.apply(x, *options, *turned))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, expert_offsets: Tensor, transposed: bool, experts: int, *tensors: Tensor) -> Any:
        if all(d is None for d in in_dims[1:]):  # B rows in the place of each one
            rows = x.movedim(in_dims[0], 1)
            out = Product.apply(rows.flatten(0, 1), expert_offsets * info.batch_size, transposed, experts, *tensors)
            return out.unflatten(0, rows.shape[:2]), 1
        return _one_by_one(Product.apply, info.batch_size, in_dims, (x, expert_offsets, transposed, experts, *tensors))


class WeightGrad(torch.autograd.Function):
    """apply(a, b, expert_offsets): `grouped_mm_wgrad`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
        with kernels_only():
            return moe_ext.grouped_mm_wgrad.default(a, b, expert_offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, expert_offsets = ctx.saved_tensors
        grad_a = Product.apply(b, expert_offsets, False, 0, grad) if ctx.needs_input_grad[0] else None
        grad_b = Product.apply(a, expert_offsets, True, 0, grad) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None, _: None) -> Tensor:
        a, b, expert_offsets = ctx.saved_tensors
        parts = [] if a_tangent is None else [WeightGrad.apply(a_tangent, b, expert_offsets)]
        parts += [] if b_tangent is None else [WeightGrad.apply(a, b_tangent, expert_offsets)]
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, expert_offsets: Tensor) -> Any:
        match tuple(d is not None for d in in_dims):
            case (True, False, False):
                out = WeightGrad.apply(a.movedim(in_dims[0], 1).flatten(1), b, expert_offsets)
                return out.unflatten(1, (info.batch_size, -1)), 1
            case (False, True, False):
                out = WeightGrad.apply(a, b.movedim(in_dims[1], 1).flatten(1), expert_offsets)
                return out.unflatten(2, (info.batch_size, -1)), 2
        return _one_by_one(WeightGrad.apply, info.batch_size, in_dims, (a, b, expert_offsets))


class BiasGrad(torch.autograd.Function):
    """apply(grad, expert_offsets): `grouped_bias_grad`."""

    @staticmethod
    def forward(grad: Tensor, expert_offsets: Tensor) -> Tensor:
        with kernels_only():
            return moe_ext.grouped_bias_grad.default(grad, expert_offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        grad, expert_offsets = inputs
        ctx.rows = grad.shape[0]
        ctx.save_for_backward(expert_offsets)
        ctx.save_for_forward(expert_offsets)

    @staticmethod
    @each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Product.apply(grad.new_ones(ctx.rows, 1), *ctx.saved_tensors, True, 0, grad[:, None]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return BiasGrad.apply(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, expert_offsets: Tensor) -> Any:
        if in_dims[1] is None:
            out = BiasGrad.apply(grad.movedim(in_dims[0], 1).flatten(1), expert_offsets)
            return out.unflatten(1, (info.batch_size, -1)), 1
        return _one_by_one(BiasGrad.apply, info.batch_size, in_dims, (grad, expert_offsets))


def _one_by_one(function: Callable[..., Tensor], count: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Tensor, int]:
    batches = [[a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)] for i in range(count)]
    return torch.stack([function(*batch) for batch in batches]), 0


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


# ---------------------------------------------------------------------------------------------------- the ops, with their signatures
def grouped_mm(x: Tensor, weight: Any, expert_offsets: Tensor, bias: Any = None, *, transposed: bool = False) -> Tensor:
    if isinstance(weight, Tensor):
        return Product.apply(x, expert_offsets, transposed, 0, weight, *(() if bias is None else (bias,)))
    return Product.apply(x, expert_offsets, transposed, len(weight), *weight, *(bias or ()))


def grouped_mm_wgrad(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    return WeightGrad.apply(a, b, expert_offsets)


def grouped_mm_wgrad_list(a: Tensor, b: Tensor, expert_offsets: Tensor) -> list[Tensor]:
    return [t.clone() for t in WeightGrad.apply(a, b, expert_offsets).unbind()]  # an op's results share no memory


def grouped_bias_grad(grad: Tensor, expert_offsets: Tensor) -> Tensor:
    return BiasGrad.apply(grad, expert_offsets)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = top_k_index.reshape(-1).long()
    experts = torch.arange(num_experts + 1, device=ids.device)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    expert_offsets = (ids[:, None] < experts).sum(0)
    row_to_slot = torch.argsort(ids, stable=True)
    slot_to_row = torch.argsort(row_to_slot)
    used = torch.arange(ids.shape[0], device=ids.device) < expert_offsets[-1]
    row_to_slot = torch.where(used, row_to_slot, -1)
    return expert_offsets.int(), row_to_slot.int(), torch.where(ids < num_experts, slot_to_row, -1).int()


def _picked(source: Tensor, index: Tensor) -> Tensor:
    """source[index], zero where index < 0. An index that is not negative occurs once, so that the gradient is exact."""
    return source.index_select(0, index.clamp(min=0)).masked_fill((index < 0)[:, None], 0)


def permute(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> Tensor:
    return _picked(x[:, None].expand(-1, top_k, -1).flatten(0, 1), row_to_slot)


def unpermute(rows: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, top_k_weights: Tensor | None = None) -> Tensor:
    slots = _wide(_picked(rows, slot_to_row)).unflatten(0, (-1, top_k))
    if top_k_weights is not None:
        slots = slots * top_k_weights.to(slots.dtype)[..., None]
    return slots.sum(1).to(rows.dtype)


def unpermute_backward(grad: Tensor, rows: Tensor, row_to_slot: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    top_k = top_k_weights.shape[1]
    slots = row_to_slot.shape[0]
    used = row_to_slot >= 0
    rows_in_order = torch.arange(slots, device=row_to_slot.device)
    slot_to_row = rows_in_order.new_full((slots + 1,), -1)
    slot_to_row = slot_to_row.scatter(0, torch.where(used, row_to_slot, slots).long(), rows_in_order)[:slots]
    g = _wide(permute(grad, row_to_slot, slot_to_row, top_k))
    w = _picked(top_k_weights.to(g.dtype).reshape(-1, 1), row_to_slot)
    products = (g * _wide(rows).masked_fill(~used[:, None], 0)).sum(1, keepdim=True)
    return (g * w).to(rows.dtype), _picked(products, slot_to_row).reshape(top_k_weights.shape).to(top_k_weights.dtype)


def gated_activation(pre_act: Tensor, **options: Any) -> Tensor:
    return reference.activation(_wide(pre_act), ExpertSpec(**options)).to(pre_act.dtype)


def gated_activation_backward(grad: Tensor, pre_act: Tensor, **options: Any) -> Tensor:
    return vjp(lambda p: gated_activation(p, **options), (pre_act,), grad)[0]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------------------------- whole layers
_OF_ACTIVATION = ("activation", "gated", "interleaved", "alpha", "limit")


def up_projection(x: Tensor, maps: Sequence[Tensor], ups: Sequence[Any], biases: Sequence[Any], transposed: bool = False) -> Tensor:
    """The pre-activation rows. ups: the stack, or the lists gate (empty if not gated) and up; biases: theirs."""
    expert_offsets, row_to_slot, slot_to_row = maps
    rows = permute(x, row_to_slot, slot_to_row, row_to_slot.shape[0] // max(x.shape[0], 1) or 1)
    pairs = zip(ups, biases, strict=True)
    parts = [grouped_mm(rows, w, expert_offsets, b, transposed=transposed) for w, b in pairs if isinstance(w, Tensor) or w]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def after_activation(
    pre_act: Tensor, top_k_weights: Tensor, maps: Sequence[Tensor], down: Any, bias: Any, options: dict[str, Any]
) -> Tensor:
    expert_offsets, row_to_slot, slot_to_row = maps
    act = gated_activation(pre_act, **{name: options[name] for name in _OF_ACTIVATION if name in options})
    y = grouped_mm(act, down, expert_offsets, bias, transposed=options.get("transposed", False))
    return unpermute(y, row_to_slot, slot_to_row, top_k_weights.shape[1], top_k_weights)


def grouped_forward(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up: Tensor, down: Tensor, up_bias: Any = None, down_bias: Any = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    maps = moe_ext.sort_by_expert(top_k_index, gate_up.shape[0])
    pre_act = up_projection(x, maps, [gate_up], [up_bias], options.get("transposed", False))
    return after_activation(pre_act, top_k_weights, maps, down, down_bias, options)


def grouped_forward_list(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate: Any, up: Any, down: Any, gate_bias: Any = None, up_bias: Any = None,
    down_bias: Any = None, **options: Any,
) -> Tensor:  # fmt: skip
    maps = moe_ext.sort_by_expert(top_k_index, len(up))
    pre_act = up_projection(x, maps, [gate, up], [gate_bias, up_bias])
    return after_activation(pre_act, top_k_weights, maps, down, down_bias, options)


# -------------------------------------------------------------------------------------------------------------------- when, and how
def transformed(tensors: Sequence[Any]) -> bool:
    """Whether the kernels would lose something: inside a transform of `torch.func`, or where a tensor has a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and _has_tangent(tensors)


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(
        forward_ad.unpack_dual(a).tangent is not None if isinstance(a, Tensor) else isinstance(a, (list, tuple)) and _has_tangent(a)
        for a in args
    )


def vjp(function: Callable[..., Tensor], args: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """The gradients of `function` at args, each as if the others did not depend on it. They can be differentiated again where the
    grad mode is on."""
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(function, *args)[1](grad)
    again = torch.is_grad_enabled()
    with torch.enable_grad():  # torch.func.vjp does not run below hooks on saved tensors
        inputs = [t.view_as(t) for t in args]
        inputs = [t if t.requires_grad else t.requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grad, create_graph=again, allow_unused=True, materialize_grads=True)

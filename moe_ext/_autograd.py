"""Gradients and autocast of every op.

`grouped_forward` saves x (only when a gradient of the up projection is needed), the pre-activation rows, the routing and its
int32 maps; with `recompute` x and the routing only. Weights are saved by reference. Without a needed gradient nothing extra is
computed or kept. Second derivatives raise instead of being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_autograd

from ._needs import Needs

_LIBRARY = torch.library.Library("moe", "IMPL")
_OWN_LIBRARY = torch.library.Library("moe_ext", "IMPL")
moe = torch.ops.moe
moe_ext = torch.ops.moe_ext


# ---------------------------------------------------------------------------------------------------------------- grouped_forward
class _Stacked:
    """How the stacked overload lays out its tensor arguments."""

    public, train, backward = moe.grouped_forward.default, moe_ext._grouped_forward_train.default, moe_ext._grouped_backward.default
    groups = (Needs.HIDDEN_STATES, None, Needs.TOP_K_WEIGHTS, Needs.GATE_UP, Needs.DOWN, Needs.GATE_UP_BIAS, Needs.DOWN_BIAS)
    projections, up_biases = (3, 4, 5, 6), (5,)  # what the backward takes; what of it only recomputation reads
    options = ("activation", "gated", "transposed", "interleaved", "alpha", "limit")


class _Listed:
    """How the list overload lays out its tensor arguments; 3 to 8 are lists."""

    public, train, backward = moe.grouped_forward.list, moe_ext._grouped_forward_train.list, moe_ext._grouped_backward.list
    groups = (
        Needs.HIDDEN_STATES, None, Needs.TOP_K_WEIGHTS,
        Needs.GATE_UP, Needs.UP, Needs.DOWN, Needs.GATE_UP_BIAS, Needs.UP_BIAS, Needs.DOWN_BIAS,
    )  # fmt: skip
    projections, up_biases = (3, 4, 5, 6, 7, 8), (6, 7)
    options = ("activation", "gated", "alpha", "limit")


_DEFAULTS = {"activation": "silu", "gated": True, "transposed": False, "interleaved": False, "alpha": None, "limit": None}


class _GroupedForward(torch.autograd.Function):
    """apply(layout, keyset, options, sizes, *flat): `flat` holds the arguments in order, lists spliced in; sizes[i] is the length
    of argument i, or None for a plain tensor or None."""

    @staticmethod
    def forward(ctx: Any, layout: Any, keyset: Any, options: dict[str, Any], sizes: tuple[int | None, ...], *flat: Tensor | None) -> Tensor:
        args = _unflatten(flat, sizes)
        with torch._C._AutoDispatchBelowAutograd():
            out, pre_act, *maps = layout.train.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)
        needed = ctx.needs_input_grad[4:]
        starts, start = [], 0
        needs = Needs(0)
        for bit, size in zip(layout.groups, sizes, strict=True):
            starts.append(start)
            width = 1 if size is None else size
            if bit is not None and any(needed[start : start + width]):
                needs |= bit
            start += width
        recompute = options.get("recompute", False)
        keep_x = recompute or bool(needs & (Needs.GATE_UP | Needs.UP))
        kept = [args[i] if recompute or i not in layout.up_biases else None for i in layout.projections]
        ctx.save_for_backward(args[0] if keep_x else None, args[2], None if recompute else pre_act, *maps, *_flatten(kept)[0])
        ctx.kept_sizes = _flatten(kept)[1]
        ctx.layout, ctx.sizes, ctx.starts, ctx.needs = layout, sizes, starts, needs
        ctx.options = _DEFAULTS | options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        kept = _unflatten(saved[6:], ctx.kept_sizes)
        options = {name: ctx.options[name] for name in ctx.layout.options}
        grads = iter(ctx.layout.backward(grad, *saved[:6], *kept, **options, needs=int(ctx.needs)))
        flat: list[Tensor | None] = [None] * sum(1 if size is None else size for size in ctx.sizes)
        for bit, size, start in zip(ctx.layout.groups, ctx.sizes, ctx.starts, strict=True):
            if bit is not None and bit in ctx.needs:
                for i in range(start, start + (1 if size is None else size)):
                    flat[i] = next(grads)
        return None, None, None, None, *flat


def _flatten(args: Sequence[Any]) -> tuple[list[Tensor | None], tuple[int | None, ...]]:
    flat: list[Tensor | None] = []
    sizes: list[int | None] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            flat.extend(arg)
            sizes.append(len(arg))
        else:
            flat.append(arg)
            sizes.append(None)
    return flat, tuple(sizes)


def _unflatten(flat: Sequence[Tensor | None], sizes: Sequence[int | None]) -> list[Any]:
    args: list[Any] = []
    start = 0
    for size in sizes:
        if size is None:
            args.append(flat[start])
            start += 1
        else:
            args.append(list(flat[start : start + size]))
            start += size
    return args


def _grouped_forward_autograd(layout: Any) -> Callable[..., Tensor]:
    def implementation(keyset: Any, *args: Any, **options: Any) -> Tensor:
        args = (*args, *(None for _ in range(len(layout.groups) - len(args))))  # the dispatcher drops trailing defaults
        if torch.is_grad_enabled():
            flat, sizes = _flatten(args)
            if any(t is not None and t.requires_grad for t in flat):
                return _GroupedForward.apply(layout, keyset, options, sizes, *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return layout.public.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return implementation


_LIBRARY.impl("grouped_forward", _grouped_forward_autograd(_Stacked), "Autograd", with_keyset=True)
_LIBRARY.impl("grouped_forward.list", _grouped_forward_autograd(_Listed), "Autograd", with_keyset=True)


# --------------------------------------------------------------------------------------------------------------------- primitives
def _setup_grouped_mm(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, weight, expert_offsets, bias = inputs
    ctx.transposed = keyword_only_inputs["transposed"]
    ctx.listed = isinstance(weight, (list, tuple))
    flat = list(weight) if ctx.listed else [weight]
    ctx.save_for_backward(x if any(w.requires_grad for w in flat) else None, expert_offsets, *flat)


@once_differentiable
def _grouped_mm_backward(ctx: Any, grad: Tensor) -> Any:
    x, expert_offsets, *flat = ctx.saved_tensors
    weight = flat if ctx.listed else flat[0]
    count = len(ctx.needs_input_grad)  # trailing defaults are not passed
    needs = [any(n) if isinstance(n, (list, tuple)) else bool(n) for n in ctx.needs_input_grad] + [False] * (4 - count)
    mm = moe_ext.grouped_mm.list if ctx.listed else moe_ext.grouped_mm.default
    wgrad = moe_ext.grouped_mm_wgrad.list if ctx.listed else moe_ext.grouped_mm_wgrad.default
    grad_x = mm(grad, weight, expert_offsets, transposed=not ctx.transposed) if needs[0] else None
    grad_weight: Any = [None] * len(flat) if ctx.listed else None
    grad_bias: Any = [None] * len(flat) if ctx.listed else None
    if needs[1]:
        grad_weight = wgrad(*((x, grad) if ctx.transposed else (grad, x)), expert_offsets)
    if needs[3]:
        grad_bias = moe_ext.grouped_bias_grad(grad, expert_offsets)
        if ctx.listed:
            grad_bias = list(grad_bias.unbind())
    return (grad_x, grad_weight, None, grad_bias)[: max(count, 3)] if ctx.listed else (grad_x, grad_weight, None, grad_bias)


for _overload in ("moe_ext::grouped_mm", "moe_ext::grouped_mm.list"):
    register_autograd(_overload, _grouped_mm_backward, setup_context=_setup_grouped_mm)


def _setup_wgrad(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def _wgrad_backward(ctx: Any, grad: Tensor) -> Any:
    a, b, expert_offsets = ctx.saved_tensors
    grad_a = moe_ext.grouped_mm(b, grad, expert_offsets) if ctx.needs_input_grad[0] else None
    grad_b = moe_ext.grouped_mm(a, grad, expert_offsets, transposed=True) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


register_autograd("moe_ext::grouped_mm_wgrad", _wgrad_backward, setup_context=_setup_wgrad)


def _setup_maps(ctx: Any, inputs: Any, output: Any) -> None:
    _, row_to_slot, slot_to_row, ctx.top_k = inputs
    ctx.save_for_backward(row_to_slot, slot_to_row)


@once_differentiable
def _permute_backward(ctx: Any, grad: Tensor) -> Any:
    return moe_ext.unpermute(grad, *ctx.saved_tensors, ctx.top_k), None, None, None


register_autograd("moe_ext::permute", _permute_backward, setup_context=_setup_maps)


def _setup_unpermute(ctx: Any, inputs: Any, output: Any) -> None:
    rows, row_to_slot, slot_to_row, ctx.top_k, top_k_weights = inputs
    needs_rows = top_k_weights is not None
    ctx.save_for_backward(rows if needs_rows else None, row_to_slot, slot_to_row, top_k_weights)


@once_differentiable
def _unpermute_backward(ctx: Any, grad: Tensor) -> Any:
    rows, row_to_slot, slot_to_row, top_k_weights = ctx.saved_tensors
    if top_k_weights is None:
        return moe_ext.permute(grad, row_to_slot, slot_to_row, ctx.top_k), None, None, None, None
    grad_rows, grad_weights = moe_ext.unpermute_backward(grad, rows, row_to_slot, top_k_weights)
    return grad_rows, None, None, None, grad_weights


register_autograd("moe_ext::unpermute", _unpermute_backward, setup_context=_setup_unpermute)


def _setup_activation(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = keyword_only_inputs


@once_differentiable
def _activation_backward(ctx: Any, grad: Tensor) -> Any:
    return moe_ext.gated_activation_backward(grad, *ctx.saved_tensors, **ctx.options)


register_autograd("moe_ext::gated_activation", _activation_backward, setup_context=_setup_activation)


def _not_differentiable(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"moe_ext::{name} is itself a gradient: its own gradient is not implemented")

    return backward


for _name in ("grouped_bias_grad", "gated_activation_backward", "unpermute_backward"):
    register_autograd(f"moe_ext::{_name}", _not_differentiable(_name))


# ----------------------------------------------------------------------------------------------------------------------- autocast
def _autocast(op: Any, device: str, keep: tuple[int, ...]) -> Callable[..., Any]:
    """As F.linear: float tensors of this device but float64 are cast to the autocast dtype; arguments in `keep` stay as they are."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]))

    def cast(arg: Any, dtype: torch.dtype) -> Any:
        if isinstance(arg, (list, tuple)):
            return [cast(a, dtype) for a in arg]
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 and arg.device.type == device:
            return arg.to(dtype)
        return arg

    def implementation(*args: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        args = tuple(a if i in keep else cast(a, dtype) for i, a in enumerate(args))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*args, **options)

    return implementation


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _overload, _keep in (("grouped_forward", (2,)), ("grouped_forward.list", (2,)), ("grouped_mm", ()), ("grouped_mm.list", ())):
        _packet, _, _variant = _overload.partition(".")
        _shared = _packet == "grouped_forward"
        _op = getattr(getattr(moe if _shared else moe_ext, _packet), _variant or "default")
        (_LIBRARY if _shared else _OWN_LIBRARY).impl(_overload, _autocast(_op, _device, _keep), _key)

"""Gradients and autocast of every op.

`grouped_forward` saves x (only when a gradient of the up projection is needed), the pre-activation rows, the routing and its
int32 maps; with `recompute` x and the routing only. Weights are saved by reference. Without a needed gradient nothing extra is
computed or kept. Second derivatives, tangents and transforms of `torch.func` go through `_formulas`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _formulas as formulas
from ._needs import Needs

_LIBRARY = torch.library.Library("moe", "IMPL")
_OWN_LIBRARY = torch.library.Library("moe_ext", "IMPL")
moe = torch.ops.moe
moe_ext = torch.ops.moe_ext


# ---------------------------------------------------------------------------------------------------------------- grouped_forward
class _Stacked:
    """How the stacked overload lays out its tensor arguments."""

    public, train, backward = moe.grouped_forward.default, moe_ext._grouped_forward_train.default, moe_ext._grouped_backward.default
    formula = staticmethod(formulas.grouped_forward)
    groups = (Needs.HIDDEN_STATES, None, Needs.TOP_K_WEIGHTS, Needs.GATE_UP, Needs.DOWN, Needs.GATE_UP_BIAS, Needs.DOWN_BIAS)
    ups, down, up_biases, down_bias = (3,), 4, (5,), 6
    options = ("activation", "gated", "transposed", "interleaved", "alpha", "limit")


class _Listed:
    """How the list overload lays out its tensor arguments; 3 to 8 are lists."""

    public, train, backward = moe.grouped_forward.list, moe_ext._grouped_forward_train.list, moe_ext._grouped_backward.list
    formula = staticmethod(formulas.grouped_forward_list)
    groups = (
        Needs.HIDDEN_STATES, None, Needs.TOP_K_WEIGHTS,
        Needs.GATE_UP, Needs.UP, Needs.DOWN, Needs.GATE_UP_BIAS, Needs.UP_BIAS, Needs.DOWN_BIAS,
    )  # fmt: skip
    ups, down, up_biases, down_bias = (3, 4), 5, (6, 7), 8
    options = ("activation", "gated", "alpha", "limit")


_DEFAULTS = {"activation": "silu", "gated": True, "transposed": False, "interleaved": False, "alpha": None, "limit": None}


_PLAIN = (Tensor, torch.nn.Parameter)


class _ReadFrom(torch.autograd.Function):
    """apply(parameter, values): the values; their gradient is the parameter's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GroupedForward(torch.autograd.Function):
    """apply(layout, keyset, options, sizes, *flat): `flat` holds the arguments in order, lists spliced in; sizes[i] is the length
    of argument i, or None for a plain tensor or None. Returns out, and the pre-activation, which is a result so that a second
    derivative reaches the inputs through it: without a gradient of the up projection x itself is not kept."""

    @staticmethod
    def forward(
        ctx: Any, layout: Any, keyset: Any, options: dict[str, Any], sizes: tuple[int | None, ...], *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
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
        kept, kept_sizes = _flatten([None if i in layout.up_biases and not recompute else a for i, a in enumerate(args)][3:])
        # A parameter may get other data before the backward. Its gradient belongs to what the forward has read.
        ctx.parameters = [t if t is not None and type(t) in _PLAIN and t.is_leaf else None for t in kept]
        kept = [t if p is None else p.detach() for t, p in zip(kept, ctx.parameters, strict=True)]
        ctx.save_for_backward(args[0] if keep_x else None, args[2], None if recompute else pre_act, *maps, *kept)
        ctx.kept_sizes = kept_sizes
        watched = [("hidden_states", args[0]), ("top_k_weights", args[2])]
        ctx.versions = [(name, weakref.ref(t), t._version) for name, t in watched if type(t) in _PLAIN]
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.sizes, ctx.starts, ctx.needs = layout, sizes, starts, needs
        ctx.options = _DEFAULTS | options
        return out, pre_act

    @staticmethod
    @formulas.each_of_a_batch
    def backward(ctx: Any, grad: Tensor | None, grad_pre_act: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _saved_tensors(ctx)
        flat_kept = list(saved[6:])
        if torch.is_grad_enabled():
            pairs = zip(flat_kept, ctx.parameters, strict=True)
            flat_kept = [_ReadFrom.apply(p, t) if p is not None and p.requires_grad else t for t, p in pairs]
        kept = _unflatten(flat_kept, ctx.kept_sizes)
        options = {name: ctx.options[name] for name in ctx.layout.options}
        if torch.is_grad_enabled() or grad is None or grad_pre_act is not None or formulas.transformed((grad, *saved)):
            found = _by_formula(ctx, grad, grad_pre_act, saved[:6], kept, options)
        else:
            found = ctx.layout.backward(grad, *saved[:6], *kept, **options, needs=int(ctx.needs))
        grads = iter(found)
        grads = iter(grads)
        flat: list[Tensor | None] = [None] * sum(1 if size is None else size for size in ctx.sizes)
        for bit, size, start in zip(ctx.layout.groups, ctx.sizes, ctx.starts, strict=True):
            if bit is not None and bit in ctx.needs:
                if size is None:
                    flat[start] = next(grads)
                else:
                    flat[start : start + size] = formulas.without_idle([next(grads) for _ in range(size)], saved[3])
        return None, None, None, None, *flat


def _saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """ctx.saved_tensors. Raises RuntimeError with the name of a tensor that was changed in place, and a way out."""
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
        return saved
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        changed = [name for name, ref, version in ctx.versions if (t := ref()) is not None and t._version != version]
        raise RuntimeError(
            f"moe::grouped_forward: {' and '.join(changed) or 'a tensor'} was changed in place between forward and backward, which reads "
            f"it again: write x = x + experts(x) instead of x += experts(x), or give the experts a copy. torch says: {error}"
        ) from error


def _by_formula(
    ctx: Any, grad: Tensor | None, grad_pre_act: Tensor | None, saved: Sequence[Any], kept: list[Any], options: dict[str, Any]
) -> list[Tensor]:
    """The needed gradients in the order of the layout's arguments, through steps that can be differentiated again."""
    layout, needs = ctx.layout, ctx.needs
    x, top_k_weights, pre_act, *maps = saved
    down, down_bias = kept[layout.down - 3], kept[layout.down_bias - 3]
    ups, up_biases = [kept[i - 3] for i in layout.ups], [kept[i - 3] for i in layout.up_biases]
    count, transposed = len(ups), options.get("transposed", False)
    wanted = [i for i, bit in enumerate(layout.groups) if bit is not None and bit in needs]

    def head(x: Tensor, *rest: Any) -> Tensor:
        return formulas.up_projection(x, maps, rest[:count], rest[count:], transposed)

    def tail(pre_act: Tensor, top_k_weights: Tensor, down: Any, down_bias: Any) -> Tensor:
        return formulas.after_activation(pre_act, top_k_weights, maps, down, down_bias, options)

    if pre_act is None:
        pre_act = head(x, *ups, *up_biases)
    hidden = down.shape[2 if transposed else 1] if isinstance(down, Tensor) else down[0].shape[0]
    if x is None:  # its values are not needed: the pre-activation is linear in it
        x = pre_act.new_zeros(top_k_weights.shape[0], hidden)
    for k, i in enumerate(layout.up_biases):  # nor are those of the biases
        if up_biases[k] is None and i in wanted:
            w, shape = ups[k], pre_act.shape[1:]
            up_biases[k] = pre_act.new_zeros(w.shape[0], *shape) if isinstance(w, Tensor) else [v.new_zeros(v.shape[0]) for v in w]
    tail_args = {-1: pre_act, 2: top_k_weights, layout.down: down, layout.down_bias: down_bias}
    head_args = {0: x, **dict(zip((*layout.ups, *layout.up_biases), (*ups, *up_biases), strict=True))}
    of_head = [i for i in head_args if i in wanted]
    if grad is None:
        grad = pre_act.new_zeros(top_k_weights.shape[0], hidden)
    found = _gradients(tail, tail_args, [i for i in tail_args if i in wanted or (i == -1 and of_head)], grad)
    if of_head:
        inner = found[-1] if grad_pre_act is None else found[-1] + grad_pre_act
        found |= _gradients(head, head_args, of_head, inner)
    return _flatten([found[i] for i in wanted])[0]  # type: ignore[return-value]


def _gradients(function: Callable[..., Tensor], args: dict[int, Any], wanted: list[int], grad: Tensor) -> dict[int, Any]:
    """The gradients of function(*args.values()) at the arguments with the numbers `wanted`; an argument may be a list."""
    flat, sizes = _flatten([args[i] for i in wanted])
    if not flat:
        return {}

    def of_wanted(*flat: Tensor) -> Tensor:
        return function(*(args | dict(zip(wanted, _unflatten(flat, sizes), strict=True))).values())

    return dict(zip(wanted, _unflatten(formulas.vjp(of_wanted, flat, grad), sizes), strict=True))  # type: ignore[arg-type]


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
        if formulas.transformed(args):
            return layout.formula(*args, **options)
        args = (*args, *(None for _ in range(len(layout.groups) - len(args))))  # the dispatcher drops trailing defaults
        if torch.is_grad_enabled():
            flat, sizes = _flatten(args)
            if any(t is not None and t.requires_grad for t in flat):
                return _GroupedForward.apply(layout, keyset, options, sizes, *flat)[0]
        with torch._C._AutoDispatchBelowAutograd():
            return layout.public.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return implementation


# --------------------------------------------------------------------------------------------------------------------- primitives
class _Step(torch.autograd.Function):
    """apply(op, save, backward, options, *args): the op itself, and a gradient made of ops that have gradients."""

    @staticmethod
    def forward(ctx: Any, op: Any, save: Callable[..., None], backward: Callable[..., Any], options: dict[str, Any], *args: Any) -> Any:
        save(ctx, *args)
        ctx.of_inputs, ctx.options, ctx.count = backward, options, len(args)
        with formulas.kernels_only():
            return op(*args, **options)

    @staticmethod
    @formulas.each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = ctx.of_inputs(ctx, grad)
        return None, None, None, None, *found, *(None for _ in range(ctx.count - len(found)))


def _step(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    op = getattr(moe_ext, name).default
    return lambda *args, **options: _Step.apply(op, save, backward, options, *args)


def _save_maps(ctx: Any, x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> None:
    ctx.save_for_backward(row_to_slot, slot_to_row)
    ctx.top_k = top_k


def _permute_backward(ctx: Any, grad: Tensor) -> Any:
    return (moe_ext.unpermute(grad, *ctx.saved_tensors, ctx.top_k),)


def _save_unpermute(
    ctx: Any, rows: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, top_k_weights: Tensor | None = None
) -> None:
    ctx.save_for_backward(None if top_k_weights is None else rows, row_to_slot, slot_to_row, top_k_weights)
    ctx.top_k = top_k


def _unpermute_backward(ctx: Any, grad: Tensor) -> Any:
    rows, row_to_slot, slot_to_row, top_k_weights = ctx.saved_tensors
    if top_k_weights is None:
        return (moe_ext.permute(grad, row_to_slot, slot_to_row, ctx.top_k),)
    grad_rows, grad_weights = moe_ext.unpermute_backward(grad, rows, row_to_slot, top_k_weights)
    return grad_rows, None, None, None, grad_weights


def _save_first(ctx: Any, pre_act: Tensor) -> None:
    ctx.save_for_backward(pre_act)


def _activation_backward(ctx: Any, grad: Tensor) -> Any:
    return (moe_ext.gated_activation_backward(grad, *ctx.saved_tensors, **ctx.options),)


#: Of each op: its formula, and what runs where a gradient is needed.
_DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "permute": (formulas.permute, _step("permute", _save_maps, _permute_backward)),
    "unpermute": (formulas.unpermute, _step("unpermute", _save_unpermute, _unpermute_backward)),
    "gated_activation": (formulas.gated_activation, _step("gated_activation", _save_first, _activation_backward)),
    "grouped_mm": (formulas.grouped_mm, formulas.grouped_mm),
    "grouped_mm.list": (formulas.grouped_mm, formulas.grouped_mm),
    "grouped_mm_wgrad": (formulas.grouped_mm_wgrad, formulas.grouped_mm_wgrad),
    "grouped_mm_wgrad.list": (formulas.grouped_mm_wgrad_list, formulas.grouped_mm_wgrad_list),
    "grouped_bias_grad": (formulas.grouped_bias_grad, formulas.grouped_bias_grad),
    "unpermute_backward": (formulas.unpermute_backward, formulas.unpermute_backward),
    "gated_activation_backward": (formulas.gated_activation_backward, formulas.gated_activation_backward),
}


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(moe if packet == "grouped_forward" else moe_ext, packet), overload or "default")


def _library(name: str) -> Any:
    """Where an op is implemented: only grouped_forward is in the namespace that other packages use too."""
    return _LIBRARY if name.partition(".")[0] == "grouped_forward" else _OWN_LIBRARY


def _autograd(op: Any, formula: Callable[..., Any], with_gradient: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(keyset: Any, *args: Any, **options: Any) -> Any:
        if formulas.transformed(args):
            return formula(*args, **options)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in _tensors(args)):
            return with_gradient(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return implementation


def _internal(op: Any) -> Callable[..., Any]:
    """Refuses where a gradient, a tangent or a transform would be lost."""

    def implementation(keyset: Any, *args: Any, **options: Any) -> Any:
        if formulas.transformed(args) or torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(f"{op} has no gradient of its own: it is a step of moe::grouped_forward")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return implementation


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [t for t in _flatten(args)[0] if isinstance(t, Tensor)]


for _layout, _name in ((_Stacked, "grouped_forward"), (_Listed, "grouped_forward.list")):
    _library(_name).impl(_name, _grouped_forward_autograd(_layout), "Autograd", with_keyset=True)
    for _op in (_layout.train, _layout.backward):
        _OWN_LIBRARY.impl(_op.name().partition("::")[2], _internal(_op), "Autograd", with_keyset=True)
for _name, _rules in _DIFFERENTIABLE.items():
    _library(_name).impl(_name, _autograd(_overload(_name), *_rules), "Autograd", with_keyset=True)


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


#: The ops that autocast casts for, and which of their arguments stay as they are.
_KEEPS: dict[str, tuple[int, ...]] = {"grouped_forward": (2,), "grouped_forward.list": (2,), "grouped_mm": (), "grouped_mm.list": ()}
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _keep in _KEEPS.items():
        _library(_name).impl(_name, _autocast(_overload(_name), _device, _keep), _key)


# ------------------------------------------------------------------------------------------------------------ transforms of torch.func
def _transform(formula: Callable[..., Any], casts: bool, keep: tuple[int, ...]) -> Callable[..., Any]:
    """The formula, in the place of the op: PyTorch transforms each of its steps. This comes before autocast."""

    def implementation(*args: Any, **options: Any) -> Any:
        device = next(t.device.type for t in _tensors(args))
        if casts and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            return _autocast(formula, device, keep)(*args, **options)
        return formula(*args, **options)

    return implementation


_FORMULAS: dict[str, Callable[..., Any]] = {
    "grouped_forward": formulas.grouped_forward, "grouped_forward.list": formulas.grouped_forward_list,
    "sort_by_expert": formulas.sort_by_expert, **{name: rules[0] for name, rules in _DIFFERENTIABLE.items()},
}  # fmt: skip
for _name, _formula in _FORMULAS.items():
    _library(_name).impl(_name, _transform(_formula, _name in _KEEPS, _KEEPS.get(_name, ())), "FuncTorchDynamicLayerFrontMode")

"""LoRA adapters of PEFT on experts: read at each call as they are then, and run grouped.

    y = x W_e^T + sum over active adapters of scaling * (x A_e^T) B_e^T

The adapters' part is computed in float32 (float64 for float64), added once and rounded once; no `W + B A` is formed, forward or backward.
PEFT keeps its adapters on linear layers (`unwrap`, `project`) or on stacked parameters (`defer_activation`, `with_adapters`).
Whatever is no plain LoRA there (dropout at work, DoRA, other tuners) runs PEFT's own code, with a reason.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _formulas, ops
from ...experts import Projection, StackedWeights
from ..usable import Refused, is_hooked


# --------------------------------------------------------------------------------------------------- facts about versions of PEFT
# PEFT has no public way to ask what a layer computes, so its classes are looked at, as they are in 0.17, 0.18 and 0.21. Delete when
# PEFT offers a layer's active factors and scaling. What is not in `sys.modules` is not in use.
def is_loaded() -> bool:
    """Whether this process has imported PEFT's layers. Until then no forward needs to ask anything below."""
    return "peft.tuners.tuners_utils" in sys.modules


#: The module of the classes that are looked at here.
LAYER_MODULE = "peft.tuners.lora.layer"


def _plain_lora_classes() -> tuple[type, ...]:
    """Linear layers whose forward is `base(x) + scaling * B(A(dropout(x)))` for each active adapter; subclasses may differ."""
    layer, bnb = sys.modules.get(LAYER_MODULE), sys.modules.get("peft.tuners.lora.bnb")
    found = (getattr(layer, "Linear", None), getattr(bnb, "Linear4bit", None))
    return tuple(c for c in found if c is not None)


def _wrapper_classes() -> tuple[type, ...]:
    """Everything of PEFT's that stands in the place of a module: layers of all tuners, and modules to save or to train in part."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    found = (getattr(tuners, "BaseTunerLayer", None), getattr(other, "AuxiliaryTrainingWrapper", None))
    return tuple(c for c in found if c is not None)


def _param_wrapper_class() -> Any:
    wrapper = getattr(sys.modules.get(LAYER_MODULE), "ParamWrapper", None)
    return wrapper if hasattr(wrapper, "_activate_lora") else None


def _taken_for_transposed(wrapper: Any) -> bool:
    """Whether PEFT takes the stack for `[E, in, out]`: it asks the module; 0.17 and 0.18 take every stack for that."""
    return not getattr(wrapper, "_did_swap_in_out_features", False)


# --------------------------------------------------------------------------------------------------------------------- computation
@dataclass(frozen=True)
class LowRank:
    """One adapter on every expert of a projection: `scaling * B_e A_e`, stacked `[E, r, in]` and `[E, out, r]` or as E matrices each."""

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    scaling: float | Tensor

    def tensors(self) -> list[Tensor]:
        return [*_as_list(self.a), *_as_list(self.b)]


Adapters: TypeAlias = list[LowRank]
Base: TypeAlias = Tensor | Sequence[Tensor] | Projection


class LoraProjection(Projection):
    """The matrices of `base` (stacked, `[E, in, out]` when transposed, or listed, or another projection) with adapters on them."""

    def __init__(self, base: Base, adapters: Adapters, transposed: bool = False) -> None:
        self.base, self.adapters, self.transposed = base, adapters, transposed

    def __len__(self) -> int:
        return len(self.base)

    def grouped_mm(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        if isinstance(self.base, Projection):
            out = self.base.grouped_mm(rows, expert_offsets)
        else:
            out = ops.grouped_mm(rows, self.base, expert_offsets, transposed=self.transposed)
        with torch.autocast(rows.device.type, enabled=False):
            total = sum_adapters(rows, expert_offsets, self.adapters)
            return (total + out).to(out.dtype)

    def __getitem__(self, e: int) -> Tensor:
        """Rounded once, to the dtype of the base; `grouped_mm` does not form it, nor round it."""
        matrix = self.base[e].T if self.transposed else self.base[e]
        total = matrix.double()
        for adapter in self.adapters:
            total = total + (adapter.b[e].double() @ adapter.a[e].double()) * adapter.scaling
        return total.to(matrix.dtype)

    def tensors(self) -> list[Tensor]:
        base = self.base.tensors() if isinstance(self.base, Projection) else _as_list(self.base)
        return [*base, *(t for adapter in self.adapters for t in adapter.tensors())]


def project(base: Any, adapters: Adapters, transposed: bool = False) -> Any:
    """`base` with `adapters` on it; without any, `base` itself."""
    return LoraProjection(base, adapters, transposed) if adapters else base


def sum_adapters(rows: Tensor, expert_offsets: Tensor, adapters: Adapters) -> Tensor:
    """`rows [S, in]` to the sum of the adapters' outputs `[S, out]`, in float32 or float64."""

    def delta(adapter: LowRank) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(rows.dtype, _as_list(adapter.a)[0].dtype), torch.float32)
        a, b = (weight.to(dtype) if isinstance(weight, Tensor) else [w.to(dtype) for w in weight] for weight in (adapter.a, adapter.b))
        inner = _shrink(rows, expert_offsets, a)
        return ops.grouped_mm(inner * adapter.scaling, b, expert_offsets)

    total = delta(adapters[0])
    for adapter in adapters[1:]:
        total = total + delta(adapter)  # not in place: selective checkpointing may have kept a product
    return total


def _shrink(rows: Tensor, expert_offsets: Tensor, a: Tensor | Sequence[Tensor]) -> Tensor:
    if not torch.compiler.is_compiling() and _formulas.transformed((rows, a)):
        dtype = _as_list(a)[0].dtype
        return ops.grouped_mm(rows.to(dtype), a, expert_offsets)
    return _Shrink.apply(rows, expert_offsets, *_as_list(a))


class _Shrink(torch.autograd.Function):
    """apply(rows `[S, in]`, expert_offsets, *A): the rows times the A of their expert, in A's dtype; one stack A, or E matrices.

    `ops.grouped_mm` would keep the rows for the gradient in A's dtype, which is wider; here they are kept as they came.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, expert_offsets: Tensor, *a: Tensor) -> Tensor:
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[2:]) else None, expert_offsets, *a)
        ctx.rows_dtype = rows.dtype
        return ops.grouped_mm(rows.to(a[0].dtype), _as_weight(a), expert_offsets)

    @staticmethod
    @_formulas.each_of_a_batch
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, expert_offsets, *a = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_rows = ops.grouped_mm(grad, _as_weight(a), expert_offsets, transposed=True) if ctx.needs_input_grad[0] else None
            grad_a: Sequence[Tensor | None] = [None] * len(a)
            if rows is not None:
                wgrad = ops.moe_ext.grouped_mm_wgrad.list if a[0].dim() == 2 else ops.moe_ext.grouped_mm_wgrad.default
                grad_a = wgrad(grad, rows.to(grad.dtype), expert_offsets)
        grad_a = [grad_a] if isinstance(grad_a, Tensor) else _formulas.without_idle(grad_a, expert_offsets)
        return None if grad_rows is None else grad_rows.to(ctx.rows_dtype), None, *grad_a


def _as_weight(tensors: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    return tensors[0] if tensors[0].dim() == 3 else tensors


def _as_list(weight: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else list(weight)


# ------------------------------------------------------------------------------------------------------------------- linear layers
_Factors: TypeAlias = tuple[Tensor, Tensor, Any]  # A [r, in], B [out, r], scaling


def unwrap(linears: Sequence[nn.Module]) -> tuple[list[nn.Module], Adapters]:
    """Takes PEFT's layers off the E linear layers of one projection: the layers below, and the adapters that are active now.

    Layers that are not PEFT's are returned as they are. Raises Refused where PEFT's own forward must run.
    """
    plain, wrappers = _plain_lora_classes(), _wrapper_classes()
    bases: list[nn.Module] = []
    found: list[list[_Factors]] = []
    for i, linear in enumerate(linears):
        factors: list[_Factors] = []
        if type(linear) in plain:
            try:
                factors = _active_factors(linear)
            except Refused as refused:
                raise Refused(f"the adapter layer of expert {i} {refused}") from None
            linear = vars(linear)["_modules"]["base_layer"]
        if type(linear) is not nn.Linear and issubclass(type(linear), wrappers):
            raise Refused(f"expert {i} has a {type(linear).__module__}.{type(linear).__qualname__}, which is no plain LoRA layer")
        bases.append(linear)
        found.append(factors)
    return bases, [_on_all_experts(entries) for entries in zip_longest(*found)]


def _active_factors(layer: Any) -> list[_Factors]:
    """What `layer`, of one of the plain classes, adds to its base layer now, in order; raises Refused where it does more."""
    parts = layer._modules
    if is_hooked(layer, parts["base_layer"]):
        raise Refused("has hooks or a forward of its own")
    if layer._disable_adapters:
        if layer.merged_adapters:
            raise Refused("is merged and disabled: PEFT's forward takes the adapter out of the weight")
        return []
    if layer.merged_adapters:
        return []
    found = []
    active = layer._active_adapter
    for name in (active,) if isinstance(active, str) else active:
        a = parts["lora_A"]._modules.get(name)
        if a is None:
            continue
        b, dropout = parts["lora_B"]._modules[name], parts["lora_dropout"]._modules[name]
        if name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name):
            raise Refused(f"has the adapter {name!r}, which is DoRA or another variant of LoRA")
        if dropout.training and type(dropout) is not nn.Identity and getattr(dropout, "p", 1) > 0:
            raise Refused(f"has dropout on its adapter {name!r}")
        if type(a) is not nn.Linear or type(b) is not nn.Linear or is_hooked(a, b, dropout):
            raise Refused(f"has other modules than linear layers, or hooks, in its adapter {name!r}")
        if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
            raise Refused(f"has a bias in its adapter {name!r}")
        weight_a, weight_b = a._parameters["weight"], b._parameters["weight"]
        if type(weight_a) not in _PLAIN_TENSORS or type(weight_b) not in _PLAIN_TENSORS:
            raise Refused(f"has a {type(weight_a).__name__} in its adapter {name!r}, not a plain tensor")
        found.append((weight_a, weight_b, layer.scaling[name]))
    return found


_PLAIN_TENSORS = (nn.Parameter, Tensor)


def _on_all_experts(entries: Sequence[_Factors | None]) -> LowRank:
    """One adapter from those of the experts. They are used as they are where they are alike; else ranks are filled up with zeros."""
    present = [entry for entry in entries if entry is not None]
    rank = max(a.shape[0] for a, _, _ in present)
    a, b, scaling = present[0]
    no_a, no_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    same_scaling = all(s is scaling or s == scaling for _, _, s in present)
    listed_a, listed_b = [], []
    for entry in entries:
        a, b, own = entry or (no_a, no_b, None)
        if not same_scaling and own is not None:
            b = b.to(torch.promote_types(b.dtype, torch.float32)) * own
        missing = rank - a.shape[0]
        listed_a.append(F.pad(a, (0, 0, 0, missing)) if missing else a)
        listed_b.append(F.pad(b, (0, missing)) if missing else b)
    return LowRank(listed_a, listed_b, scaling if same_scaling else 1.0)


# ------------------------------------------------------------------------------------------------------------------ stacked experts
#: The attribute of PEFT's class that holds its own method.
_ORIGINAL = "_moe_ext_original_activate_lora"


@dataclass(eq=False)
class _Pending:
    """A ParamWrapper whose activation is put off, and the adapters it would activate."""

    wrapper: Any
    active: list[str]
    applied: bool = False


#: The attribute of a set of experts that holds what PEFT has put on it, for the length of a call: of all threads, and by thread.
_ALL_THREADS = "_moe_ext_pending_adapters"


def _slots() -> tuple[str, ...]:
    if torch.compiler.is_compiling():
        return (_ALL_THREADS,)
    return _ALL_THREADS, f"{_ALL_THREADS}_{threading.get_ident()}"


def _pending(experts: nn.Module) -> Sequence[_Pending]:
    """What waits for this call. A compiled forward cannot ask for its thread; adapters of the same wrapper are the same in all threads,
    since a wrapper's state is."""
    return experts.__dict__.get(_slots()[-1], ())


def defer_activation(accepts: Callable[[nn.Module, str], bool]) -> None:
    """Makes ParamWrappers around experts that `accepts(experts, parameter_name)` leave it to those experts to apply their adapters.

    PEFT would add `B A` to the whole stack before the experts are called, where nothing can tell it from a weight. Only the one method
    that does this is replaced; whether adapters are active, merged or disabled stays PEFT's decision. It is replaced on the class, once
    per process, since PEFT makes new wrappers at any time; for all other wrappers, and after `disable`, it does what it did.
    """
    wrapper_class = _param_wrapper_class()
    if wrapper_class is None or hasattr(wrapper_class, _ORIGINAL):
        return
    original = wrapper_class._activate_lora

    @contextlib.contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        experts, active = self.get_base_layer(), [name for name in active_adapters if name in self.lora_A]
        if not active or type(self) is not wrapper_class or not accepts(experts, self.parameter_name):
            with original(self, active_adapters):
                yield
            return
        pending, slots = _Pending(self, active), _slots()
        for slot in slots:
            experts.__dict__.setdefault(slot, []).append(pending)
        try:
            yield
        finally:
            for slot in slots:
                experts.__dict__[slot].remove(pending)
                if not experts.__dict__[slot]:
                    del experts.__dict__[slot]
        if not pending.applied:
            raise RuntimeError(f"{type(experts).__name__}.forward did not run moe_ext, which was to apply its adapters {active}")

    setattr(wrapper_class, _ORIGINAL, original)
    wrapper_class._activate_lora = _activate_lora


def with_adapters(experts: nn.Module, weights: StackedWeights, names: tuple[str, str], transposed: bool) -> StackedWeights:
    """`weights`, whose `gate_up_proj` and `down_proj` are parameters called `names`, with the adapters that wait for this call on them.

    Raises Refused where they have to be applied as PEFT does it, which `activated` does.
    """
    pending = _pending(experts)
    if not pending:
        return weights
    found: dict[str, Adapters] = {}
    for i, one in enumerate(pending):
        if any(one.wrapper is earlier.wrapper for earlier in pending[:i]):
            continue  # of another thread
        adapters = [_stacked_factors(one.wrapper, name, transposed) for name in one.active]
        if any(type(t) not in _PLAIN_TENSORS for adapter in adapters for t in adapter.tensors()):
            raise Refused(f"an adapter of {one.wrapper.parameter_name} is not a plain tensor")
        found.setdefault(one.wrapper.parameter_name, []).extend(adapters)
    for one in pending:
        one.applied = True
    gate_up, down = (found.get(name, []) for name in names)
    return replace(
        weights,
        gate_up_proj=project(weights.gate_up_proj, gate_up, transposed),
        down_proj=project(weights.down_proj, down, transposed),
    )


def _stacked_factors(wrapper: Any, name: str, transposed: bool) -> LowRank:
    """PEFT keeps A as `[E * r, in]`, but B as `[out, r * E]`: its columns run over the experts first."""
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    experts = wrapper.num_experts
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
    if _taken_for_transposed(wrapper) != transposed:  # then rows are columns to PEFT
        a, b = b.mT, a.mT
    return LowRank(a, b, wrapper.scaling[name])


@contextlib.contextmanager
def activated(experts: nn.Module) -> Iterator[None]:
    """The adapters that wait for this call are applied as PEFT does it, to the whole stack, for the length of a `with` statement."""
    with contextlib.ExitStack() as stack:
        for pending in _pending(experts):
            pending.applied = True
            stack.enter_context(getattr(type(pending.wrapper), _ORIGINAL)(pending.wrapper, pending.active))
        yield


def is_materialised(module: nn.Module) -> bool:
    """Whether PEFT has added an adapter to the whole stack of a weight of `module` for this call."""
    parametrizations = module._modules.get("parametrizations")
    return parametrizations is not None and any(type(m).__module__.startswith("peft.") for m in parametrizations.modules())

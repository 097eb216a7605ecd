"""Stacked experts of transformers >= 5: the experts implementation "moe_ext", and what it keeps on each module.

transformers calls `experts_forward(module, hidden_states, top_k_index, top_k_weights)` with hidden_states `[T,H]` and routing
`[T,K]` from the model's own router. The weights are attributes of the module, read at each call: adapters that replace them by
parametrizations, merges and moves are seen. A module's plan is a plain attribute: it is copied and pickled with the module and
is in no state_dict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ... import functional
from ...experts import ExpertWeights
from .. import formulas, transformers_facts
from ..find import modules
from ..sandbox import replaced_method
from ..usable import DISABLE_VARIABLE, autocast_is_on, disabled_by_environment, log_once
from . import peft

#: The name in transformers' registry of experts implementations.
IMPLEMENTATION = "moe_ext"

_PLAN = "_moe_ext_plan"


@dataclass
class StackedPlan:
    """How one module is run: `reason` says why its previous implementation keeps running, or is None."""

    formula: formulas.Formula | None
    reason: str | None = None
    previous: str | None = field(default=None)
    proven: bool = False
    act_fn: type | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model dispatches on the name in its config: the process it arrives in must know the name.
        self.__dict__.update(state)
        register()


def register() -> None:
    """Makes `experts_implementation="moe_ext"` known to transformers >= 5; may be called any number of times.

    Raises ImportError where transformers is missing or has no registry of experts implementations.
    """
    registry = transformers_facts.experts_registry()
    if registry.get(IMPLEMENTATION) is not experts_forward:
        type(registry).register(IMPLEMENTATION, experts_forward)
    peft.defer_activation(runs_ours)


def runs_ours(module: nn.Module, name: str) -> bool:
    """Whether a call of `module` ends in `experts_forward`, and `name` is one of the two stacks that adapters can be read for there."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != IMPLEMENTATION:
        return False
    if plan_of(module) is None and not (transformers_facts.is_decorated(module) and can_share_config(module)):
        return False
    return name in stack_names(module) and replaced_method(module) is None


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of `self` through `moe_ext.grouped_experts`, or its previous implementation where that cannot be used now."""
    plan = plan_of(self)
    if plan is None:
        plan = _plan_on_first_use(self)
    reason = plan.reason
    if reason is None and disabled_by_environment():
        reason = f"{DISABLE_VARIABLE} is set"
    if reason is None and type(getattr(self, "act_fn", None)) is not plan.act_fn and not plan.formula.own_gate:  # type: ignore[union-attr]
        reason = f"its act_fn is another than when it was enabled, a {type(self.act_fn).__name__}"
    weights = reason or _read_adapted(self, hidden_states)
    if isinstance(weights, ExpertWeights):
        assert plan.formula is not None
        out = functional.grouped_experts(hidden_states, top_k_index, top_k_weights, weights, plan.formula.resolve(self))
        return out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)  # autocast computes in its own dtype
    log_once(f"{type(self).__name__} runs its own {plan.previous or 'eager'} implementation: {weights}")
    with peft.activated(self):
        return run_implementation(self, plan.previous, hidden_states, top_k_index, top_k_weights)


def _read_adapted(module: nn.Module, hidden_states: Tensor) -> ExpertWeights | str:
    """The weights with the adapters that PEFT has on them now, or the reason why they cannot be used."""
    weights = read_weights(module)
    if peft.is_materialised(module):
        log_once(f"{type(module).__name__} is called with PEFT's adapters added to whole weights; moe_ext.enable(model) again groups them")
    return _unusable(weights, hidden_states) or peft.with_adapters(
        module, weights, stack_names(module), transformers_facts.flag(module, "is_transposed")
    )


def stack_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of weights."""
    return ("gate_up_proj" if transformers_facts.flag(module, "has_gate") else "up_proj", "down_proj")


def read_weights(module: nn.Module) -> ExpertWeights:
    """The tensors that `module` computes with at this moment."""
    gate_up, down = stack_names(module)
    biased = transformers_facts.flag(module, "has_bias")
    return ExpertWeights(
        gate_up_proj=getattr(module, gate_up),
        down_proj=getattr(module, down),
        gate_up_bias=getattr(module, f"{gate_up}_bias") if biased else None,
        down_bias=getattr(module, f"{down}_bias") if biased else None,
    )


def run_implementation(module: nn.Module, implementation: str | None, *args: Tensor) -> Tensor:
    """Runs one of transformers' implementations; None, "eager" and our own name mean the loop the class was written with."""
    eager = transformers_facts.eager_forward(module)
    if implementation in (None, "eager", IMPLEMENTATION):
        return eager(module, *args)
    return transformers_facts.implementation(module, implementation, eager)(module, *args)


def plan_of(module: nn.Module) -> StackedPlan | None:
    return getattr(module, _PLAN, None)


def can_share_config(module: nn.Module) -> bool:
    """Whether a decorated module still works when its config names our implementation, even if it is skipped."""
    return transformers_facts.registry_of(module) is transformers_facts.experts_registry() and (
        transformers_facts.experts_implementation(module) not in transformers_facts.LOCKED_IMPLEMENTATIONS
    )


def is_enabled(module: nn.Module) -> bool:
    plan = plan_of(module)
    return plan is not None and plan.reason is None and transformers_facts.experts_implementation(module) == IMPLEMENTATION


def previous_implementation(module: nn.Module) -> str | None:
    """What `module` dispatched on before it was enabled; what it dispatches on, if it is not enabled."""
    plan, current = plan_of(module), transformers_facts.experts_implementation(module)
    return plan.previous if plan is not None and current == IMPLEMENTATION else current


def apply(module: nn.Module, plan: StackedPlan) -> None:
    register()
    plan.act_fn = type(getattr(module, "act_fn", None))
    setattr(module, _PLAN, plan)
    transformers_facts.set_experts_implementation(module, IMPLEMENTATION)


def revert(module: nn.Module) -> bool:
    """Takes back `apply`, and nothing else: an implementation that was chosen since then stays. Whether there was a plan."""
    plan = plan_of(module)
    if plan is None:
        return False
    delattr(module, _PLAN)
    if transformers_facts.experts_implementation(module) == IMPLEMENTATION:
        transformers_facts.set_experts_implementation(module, plan.previous)
    return plan.reason is None


def _plan_on_first_use(module: nn.Module) -> StackedPlan:
    """The plan of a module that was given the name "moe_ext" without `enable`: detected, but not proven."""
    if torch.compiler.is_compiling():
        # The formula cannot be probed inside a graph; the module's own functions need no probing.
        return StackedPlan(formulas.own_formula(module))
    found = modules.stacked(module)
    plan = StackedPlan(found.formula, found.reason, previous=IMPLEMENTATION, act_fn=type(getattr(module, "act_fn", None)))
    setattr(module, _PLAN, plan)
    if plan.reason is None:
        log_once(
            f"{type(module).__name__} runs experts_implementation='moe_ext' without having been proven against transformers' own; "
            "moe_ext.enable(model) proves it"
        )
    return plan


def _unusable(weights: ExpertWeights, hidden_states: Tensor) -> str | None:
    autocast = autocast_is_on(hidden_states.device)
    for t in weights.tensors():
        if is_traceable_wrapper_subclass(t):
            return f"a weight is a {type(t).__name__}, not a plain tensor"
        if t.numel() == 0:
            return "a weight is empty: it is sharded by ZeRO-3, or not loaded"
        if t.device != hidden_states.device:
            return f"a weight is on {t.device}, hidden_states on {hidden_states.device}"
        if t.dtype != hidden_states.dtype and not autocast:
            return f"a weight is {t.dtype}, hidden_states {hidden_states.dtype}"
    return None

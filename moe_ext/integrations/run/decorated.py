"""Experts behind transformers' decorator (>= 5): the experts implementation "moe_ext", and what it keeps on each module.

transformers calls `experts_forward(module, hidden_states, top_k_index, top_k_weights)` with hidden_states `[T,H]` and routing
`[T,K]` from the model's own router. The weights are attributes of the module, read at each call: adapters that replace them by
parametrizations, merges and moves are seen. A module's plan is a plain attribute: it is copied and pickled with the module and
is in no state_dict.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ... import functional
from ...experts import ExpertSpec, StackedWeights
from .. import formulas, transformers_facts
from ..after_import import after_import
from ..usable import Refused, log_once, require_enabled, require_own_method, require_plain, require_usable
from . import peft
from .code_reading import Scope
from .unchanged import Basis

#: The name in transformers' registry of experts implementations.
IMPLEMENTATION = "moe_ext"

_PLAN = "_moe_ext_plan"


# ------------------------------------------------------------------------------------------------------------------- what it is
def layout_of(module: nn.Module, spec: ExpertSpec) -> str:
    """What the report says of the weights. The flags of the class tell; shapes are never asked (square weights are ambiguous)."""
    rows = "2I" if spec.gated else "I"
    words = [f"stacked [E,H,{rows}]" if spec.transposed else f"stacked [E,{rows},H]"]
    words += ["interleaved"] if spec.interleaved else []
    words += ["bias"] if transformers_facts.flag(module, "has_bias") else []
    return ", ".join(words)


def formula_of(module: nn.Module) -> formulas.Formula:
    """The formula that a decorated module computes by; raises Refused where we cannot compute in its place."""
    if not _asks_the_registry(module):
        raise Refused(f"its class runs through a registry of its own, {type(transformers_facts.registry_of(module)).__name__}")
    implementation = transformers_facts.experts_implementation(module)
    if implementation in transformers_facts.LOCKED_IMPLEMENTATIONS:
        raise Refused(f"experts_implementation={implementation!r} has rewritten the weights at load time")
    stacks = _checked_stacks(module)
    require_plain(module)
    require_usable(stacks)
    # Below a hook of accelerate its forward still asks the registry, when the weights are where they are needed.
    if not transformers_facts.has_accelerate_hook(module):
        require_own_method(module)
    return formulas.decorated_formula(module)


def _checked_stacks(module: nn.Module) -> list[Tensor]:
    first, down = stack_names(module)
    dims = {first: 3, down: 3}
    if transformers_facts.flag(module, "has_bias"):
        dims |= {f"{first}_bias": 2, f"{down}_bias": 2}
    found = []
    for name, dim in dims.items():
        t = getattr(module, name, None)
        if not isinstance(t, Tensor):
            raise Refused(f"{name} is missing")
        if t.dim() != dim:
            raise Refused(f"{name} has shape {tuple(t.shape)}, expected {dim} dimensions")
        found.append(t)
    return found


def _asks_the_registry(module: nn.Module) -> bool:
    return transformers_facts.registry_of(module) is transformers_facts.experts_registry()


def can_share_config(module: nn.Module) -> bool:
    """Whether a decorated module still works when its config names our implementation, even if it is skipped."""
    return _asks_the_registry(module) and transformers_facts.experts_implementation(module) not in transformers_facts.LOCKED_IMPLEMENTATIONS


def stack_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two stacks of weights."""
    return ("gate_up_proj" if transformers_facts.flag(module, "has_gate") else "up_proj", "down_proj")


def read_weights(module: nn.Module) -> StackedWeights:
    """The tensors that `module` computes with at this moment."""
    gate_up, down = stack_names(module)
    biased = transformers_facts.flag(module, "has_bias")
    return StackedWeights(
        gate_up_proj=getattr(module, gate_up),
        down_proj=getattr(module, down),
        gate_up_bias=getattr(module, f"{gate_up}_bias") if biased else None,
        down_bias=getattr(module, f"{down}_bias") if biased else None,
    )


# --------------------------------------------------------------------------------------------------------------------- the plans
@dataclass
class Plan(ABC):
    """How one module is run whose config names our implementation. previous: the implementation that it had before."""

    previous: str | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model dispatches on the name in its config: the process it arrives in must know the name.
        self.__dict__.update(state)
        register()

    @abstractmethod
    def read(self, module: nn.Module, hidden_states: Tensor) -> StackedWeights:
        """The weights for a call; raises Refused where the previous implementation has to run."""

    @abstractmethod
    def run(self, module: nn.Module, weights: StackedWeights, *args: Tensor) -> Tensor:
        """The result of a call with hidden_states, top_k_index and top_k_weights."""


@dataclass
class Enabled(Plan):
    """Ours runs, by this formula, as long as what it was read from does not change."""

    formula: formulas.Formula
    basis: Basis

    def read(self, module: nn.Module, hidden_states: Tensor) -> StackedWeights:
        require_enabled()
        self.basis.require(module)
        return read_adapted(module, hidden_states)

    def run(self, module: nn.Module, weights: StackedWeights, *args: Tensor) -> Tensor:
        hidden_states, top_k_index, top_k_weights = args
        out = functional.grouped_experts(hidden_states, top_k_index, top_k_weights, weights, self.formula.resolve(module))
        return out if out.dtype == hidden_states.dtype else out.to(hidden_states.dtype)  # autocast computes in its own dtype


@dataclass
class Skipped(Plan):
    """The previous implementation runs, because others with the same config were enabled and this one was not."""

    reason: str

    def read(self, module: nn.Module, hidden_states: Tensor) -> StackedWeights:
        raise Refused(self.reason)

    def run(self, module: nn.Module, weights: StackedWeights, *args: Tensor) -> Tensor:
        return run_implementation(module, self.previous, *args)


def plan_of(module: nn.Module) -> Plan | None:
    return getattr(module, _PLAN, None)


def plan_for(module: nn.Module, formula: formulas.Formula, previous: str | None) -> Enabled:
    basis = Basis(Scope(("forward", "_apply_gate"), skip=formula.read_anew))
    basis.remember(module)
    return Enabled(previous, formula, basis)


def is_enabled(module: nn.Module) -> bool:
    return isinstance(plan_of(module), Enabled) and transformers_facts.experts_implementation(module) == IMPLEMENTATION


def previous_implementation(module: nn.Module) -> str | None:
    """What `module` dispatched on before it was enabled; what it dispatches on, if it is not enabled."""
    plan, current = plan_of(module), transformers_facts.experts_implementation(module)
    return plan.previous if plan is not None and current == IMPLEMENTATION else current


def apply(module: nn.Module, plan: Plan) -> None:
    register()
    setattr(module, _PLAN, plan)
    transformers_facts.set_experts_implementation(module, IMPLEMENTATION)


def revert(module: nn.Module) -> bool:
    """Takes back `apply`, and nothing else: an implementation that was chosen since then stays. Whether ours ran."""
    plan = plan_of(module)
    if plan is None:
        return False
    delattr(module, _PLAN)
    if transformers_facts.experts_implementation(module) == IMPLEMENTATION:
        transformers_facts.set_experts_implementation(module, plan.previous)
    return isinstance(plan, Enabled)


# ---------------------------------------------------------------------------------------------------------------------- the call
def register() -> None:
    """Makes `experts_implementation="moe_ext"` known to transformers >= 5; may be called any number of times.

    Raises ImportError where transformers is missing or has no registry of experts implementations.
    """
    registry = transformers_facts.experts_registry()
    if registry.get(IMPLEMENTATION) is not experts_forward:
        type(registry).register(IMPLEMENTATION, experts_forward)
    transformers_facts.accept_implementation(IMPLEMENTATION)
    peft.defer_activation(runs_ours)


def register_when_loaded() -> None:
    """Does what `register` does as soon as transformers, and PEFT, are loaded: now, or when something imports them.

    What cannot be registered is logged: an import of transformers does not fail because of us.
    """

    def registered() -> None:
        try:
            register()
        except (ImportError, AttributeError) as error:
            log_once(f"experts_implementation={IMPLEMENTATION!r} is not registered: {error}")

    after_import(transformers_facts.REGISTRY_MODULE, registered)
    after_import(transformers_facts.MODELS_MODULE, functools.partial(transformers_facts.accept_implementation, IMPLEMENTATION))
    after_import(peft.LAYER_MODULE, functools.partial(peft.defer_activation, runs_ours))


def runs_ours(module: nn.Module, name: str) -> bool:
    """Whether a call of `module` ends in `experts_forward`, and `name` is one of the two stacks that adapters can be read for there."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != IMPLEMENTATION:
        return False
    if plan_of(module) is None and not (transformers_facts.is_decorated(module) and can_share_config(module)):
        return False
    try:
        require_own_method(module)
    except Refused:
        return False
    return name in stack_names(module)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of `self` through `moe_ext.grouped_experts`, or its previous implementation where that cannot be used now."""
    if torch.compiler.is_compiling():
        _plan_outside(self)
    plan = plan_of(self) or _plan_on_first_use(self)
    try:
        weights = plan.read(self, hidden_states)
    except Refused as refused:
        log_once(f"{type(self).__name__} runs its own {plan.previous or 'eager'} implementation: {refused}")
    else:
        return plan.run(self, weights, hidden_states, top_k_index, top_k_weights)
    with peft.activated(self) if peft.is_loaded() else contextlib.nullcontext():
        return run_implementation(self, plan.previous, hidden_states, top_k_index, top_k_weights)


def read_adapted(module: nn.Module, hidden_states: Tensor) -> StackedWeights:
    """The weights with the adapters that PEFT has on them now; raises Refused where the ops cannot use them."""
    weights = read_weights(module)
    require_usable(weights.tensors(), hidden_states)
    if not peft.is_loaded():
        return weights
    if peft.is_materialised(module):
        log_once(f"{type(module).__name__} is called with PEFT's adapters added to whole weights; moe_ext.enable(model) again groups them")
    return peft.with_adapters(module, weights, stack_names(module), transformers_facts.flag(module, "is_transposed"))


def run_implementation(module: nn.Module, implementation: str | None, *args: Tensor) -> Tensor:
    """Runs one of transformers' implementations; None, "eager" and our own name mean the loop the class was written with."""
    eager = transformers_facts.eager_forward(module)
    if implementation in (None, "eager", IMPLEMENTATION):
        return eager(module, *args)
    return transformers_facts.implementation(module, implementation, eager)(module, *args)


@torch.compiler.assume_constant_result
def _plan_outside(module: nn.Module) -> bool:
    """Makes the plan of a module that is being compiled or exported, if it has none, outside of the graph."""
    if plan_of(module) is None:
        with _disable_current_modes():
            _plan_on_first_use(module)
    return True


def _plan_on_first_use(module: nn.Module) -> Plan:
    """The plan of a module that was given the name "moe_ext" without `enable`: detected, but not proven."""
    try:
        plan: Plan = plan_for(module, formula_of(module), IMPLEMENTATION)
    except Refused as refused:
        plan = Skipped(IMPLEMENTATION, str(refused))
    else:
        log_once(
            f"{type(module).__name__} runs experts_implementation='moe_ext' without having been proven against transformers' own; "
            "moe_ext.enable(model) proves it"
        )
    setattr(module, _PLAN, plan)
    return plan

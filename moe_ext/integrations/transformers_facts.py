"""Facts about installed versions of transformers, each with the condition under which it can be deleted.

Importing this imports no transformers. A model that uses transformers has imported it already, so what is not in `sys.modules`
need not be known; only `register` imports it, because the user asked for it by name, or because it was just imported.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

# What `use_experts_implementation` (transformers >= 5.0) leaves on an instance. Delete when transformers describes the layout of
# stacked experts in a public object.
LAYOUT_FLAGS = ("has_bias", "is_transposed")
# Flags that came later, and what holds of all experts of releases without them. Delete each when the first release with it is the oldest
# supported one: 5.3, 5.7, 5.20. Experts with gate and up interleaved are older than their flag: their own gate tells.
LATER_FLAGS = {"has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}

# Experts implementations that rewrite the weights into a layout of their own at load time, so that nothing else can read them.
# Delete when transformers allows to switch away from them.
LOCKED_IMPLEMENTATIONS = ("deepgemm_megamoe",)


#: The module of the registry of experts implementations, and that of the models, which check the name of one. Delete when transformers
#: finds implementations through entry points.
REGISTRY_MODULE = "transformers.integrations.moe"
MODELS_MODULE = "transformers.modeling_utils"


def experts_registry() -> Any:
    """transformers' `ALL_EXPERTS_FUNCTIONS`; raises ImportError with the way out where there is none."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        # Delete when transformers 4 is no longer supported: it has no registry, its blocks are patched one by one.
        raise ImportError(
            "experts_implementation='moe_ext' needs transformers >= 5 with its registry of experts implementations; "
            "with an older one, call moe_ext.enable(model) after loading"
        ) from error
    return ALL_EXPERTS_FUNCTIONS


def accept_implementation(name: str) -> None:
    """Makes models accept `name` as an experts implementation; may be called any number of times.

    Releases from 5.7 on look into the registry. Earlier ones compare with a list in the code of the check, so the check is wrapped there.
    Delete when 5.7 is the oldest supported release.
    """
    model_class = getattr(sys.modules.get(MODELS_MODULE), "PreTrainedModel", None)
    check = getattr(model_class, "get_correct_experts_implementation", None)
    if check is None or getattr(check, _ACCEPTS, None) == name or _GLOBAL_REGISTRY in check.__code__.co_names:
        return

    @functools.wraps(check)
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        return name if requested_experts == name else check(self, requested_experts)  # type: ignore[no-any-return]

    setattr(get_correct_experts_implementation, _ACCEPTS, name)
    model_class.get_correct_experts_implementation = get_correct_experts_implementation  # type: ignore[union-attr]


#: The attribute of a wrapped check that holds the name it accepts besides.
_ACCEPTS = "_moe_ext_accepts"


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' decorator made this class of experts: its flags are set, and forward asks the registry what to run."""
    return (
        all(hasattr(module, flag) for flag in LAYOUT_FLAGS)
        and hasattr(module, "_apply_gate")
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and "experts_interface" in _forward_variables(module)
    )


def flag(module: nn.Module, name: str) -> bool:
    """A flag of the layout of decorated experts; where the release does not have it, what holds of all its experts."""
    return getattr(module, name, LATER_FLAGS[name]) if name in LATER_FLAGS else getattr(module, name)


def registry_of(module: nn.Module) -> Any:
    """The registry that a decorated class dispatches through: quantized experts have another than `ALL_EXPERTS_FUNCTIONS`."""
    return _forward_variables(module)["experts_interface"]


def eager_forward(module: nn.Module) -> Callable[..., Any]:
    """The loop over experts that a decorated class was written with: what `experts_implementation="eager"` runs."""
    return _forward_variables(module)["original_forward"]


def implementation(module: nn.Module, name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """What the registry of a decorated class has under `name`."""
    registry = registry_of(module)
    # Delete the alternative when transformers 5.0 is no longer supported: its registry is a mapping and no more.
    return registry.get_interface(name, eager) if hasattr(registry, "get_interface") else registry[name]


def _forward_variables(module: nn.Module) -> dict[str, Any]:
    # Delete when the decorator exposes its registry and the undecorated forward as attributes: until then they are in its closure.
    forward = inspect.unwrap(type(module).forward, stop=_dispatches)
    names = _free_variables(forward)
    found = {name: cell.cell_contents for name, cell in zip(names, forward.__closure__ or (), strict=True)} if names else {}
    if _dispatches(forward):
        found.setdefault("experts_interface", forward.__globals__.get(_GLOBAL_REGISTRY))
    return found


# Where the decorator of transformers 5.0 to 5.3 has its registry. Delete when these are no longer supported.
_GLOBAL_REGISTRY = "ALL_EXPERTS_FUNCTIONS"


def _dispatches(function: Any) -> bool:
    """Whether this is the forward that the decorator puts around another."""
    names = _free_variables(function)
    return "experts_interface" in names or ("original_forward" in names and _GLOBAL_REGISTRY in function.__code__.co_names)


def _free_variables(function: Any) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_freevars", ())


def experts_implementation(module: nn.Module) -> str | None:
    return module.config._experts_implementation


def set_experts_implementation(module: nn.Module, value: str | None) -> None:
    """Sets what `module` dispatches on, for this config alone.

    The public setter of a config also writes to all its sub-configs; the attribute behind it is what transformers'
    `PreTrainedModel.set_experts_implementation` writes. Delete the distinction when the public setter stops recursing.
    """
    config: Any = module.config
    name = "_experts_implementation_internal" if hasattr(config, "_experts_implementation_internal") else "_experts_implementation"
    setattr(config, name, value)


#: The name that PEFT's wrappers give to what they wrap.
WRAPPED = "base_layer"


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has put this module around another one: the other is its `base_layer`."""
    # Delete when PEFT no longer wraps modules whose parameters it targets.
    return module._modules.get(WRAPPED) is not None


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward of this module by one that calls it between its hooks."""
    # Delete when accelerate registers ordinary forward hooks.
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__

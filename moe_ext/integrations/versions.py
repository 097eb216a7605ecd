"""Facts about installed versions of transformers, each with the condition under which it can be deleted.

Importing this imports no transformers. A model that uses transformers has imported it already, so what is not in `sys.modules`
need not be known; only `register` imports it, because the user asked for it by name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

# What `use_experts_implementation` (transformers >= 5.0) leaves on an instance. Delete when transformers describes the layout of
# stacked experts in a public object.
LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")

# Experts implementations that rewrite the weights into a layout of their own at load time, so that nothing else can read them.
# Delete when transformers allows to switch away from them.
LOCKED_IMPLEMENTATIONS = ("deepgemm_megamoe",)


def transformers_if_loaded() -> ModuleType | None:
    return sys.modules.get("transformers")


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


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' decorator made this class of experts: its flags are set, and forward asks the registry what to run."""
    return (
        all(hasattr(module, flag) for flag in LAYOUT_FLAGS)
        and hasattr(module, "_apply_gate")
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and "experts_interface" in _forward_variables(module)
    )


def registry_of(module: nn.Module) -> Any:
    """The registry that a decorated class dispatches through: quantized experts have another than `ALL_EXPERTS_FUNCTIONS`."""
    return _forward_variables(module)["experts_interface"]


def eager_forward(module: nn.Module) -> Callable[..., Any]:
    """The loop over experts that a decorated class was written with: what `experts_implementation="eager"` runs."""
    return _forward_variables(module)["original_forward"]


def _forward_variables(module: nn.Module) -> dict[str, Any]:
    # Delete when the decorator exposes its registry and the undecorated forward as attributes: until then they are in its closure.
    forward = inspect.unwrap(type(module).forward, stop=lambda f: "experts_interface" in _free_variables(f))
    names = _free_variables(forward)
    return {name: cell.cell_contents for name, cell in zip(names, forward.__closure__ or (), strict=True)} if names else {}


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


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has put this module around another one: the other is its `base_layer`."""
    # Delete when PEFT no longer wraps modules whose parameters it targets.
    return module._modules.get("base_layer") is not None


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate has replaced the forward of this module by one that calls it between its hooks."""
    # Delete when accelerate registers ordinary forward hooks.
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__

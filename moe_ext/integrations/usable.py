"""Whether our code may run in place of the model's own now, and saying why not: once per reason, in the logger "moe_ext"."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: The environment variable that switches everything off.
DISABLE_VARIABLE = "MOE_EXT_DISABLE"

#: The attribute of a module that holds the callables we put in place of its methods, by name.
OUR_PATCHES = "_moe_ext_patches"

#: The dtypes that the ops compute in.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Refused(Exception):
    """Why something is left to the model's own code: one sentence, which `str()` gives."""


class NotNow(Refused):
    """A reason that may pass, as that weights are offloaded or sharded: the same model can be enabled at another time."""


def disabled_by_environment() -> bool:
    """Whether MOE_EXT_DISABLE asks for the models' own code; read at each call (by a compiled graph: when it is traced)."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def require_enabled() -> None:
    """Raises Refused where MOE_EXT_DISABLE is set."""
    if disabled_by_environment():
        raise Refused(f"{DISABLE_VARIABLE} is set")


def require_usable(tensors: Sequence[Tensor | None], like: Tensor | None = None) -> None:
    """Raises Refused unless the ops can compute `like` with these tensors now; without `like`, unless they fit each other."""
    first = tensors[0] if like is None else like
    for t in tensors:
        if t is None or first is None:
            raise Refused("a weight is missing or is computed by a parametrization")
        if is_traceable_wrapper_subclass(t):
            raise NotNow(f"a weight is a {type(t).__name__}, not a plain tensor")
        if t.numel() == 0:
            raise NotNow("a weight is empty: it is sharded by ZeRO-3, or not loaded")
        if t.dtype not in DTYPES:
            raise Refused(f"a weight is {_name(t.dtype)}; supported are {', '.join(map(_name, DTYPES))}")
        if t.device != first.device or (t.dtype != first.dtype and not (like is not None and autocast_is_on(first.device))):
            raise NotNow(f"a weight is {_name(t.dtype)} on {t.device}, where {_name(first.dtype)} on {first.device} is needed")


def require_plain(module: nn.Module) -> None:
    """Raises Refused for a module with a parameter that is no plain tensor."""
    other = next((p for p in module.parameters() if is_traceable_wrapper_subclass(p)), None)
    if other is not None:
        raise NotNow(f"a weight is a {type(other).__name__}, not a plain tensor: enable before the model is sharded")


def require_known_dtypes(module: nn.Module) -> None:
    """Raises Refused for a module with a parameter of a floating-point dtype that the ops do not compute in. Packed ones are integers."""
    other = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype not in DTYPES), None)
    if other is not None:
        raise Refused(f"a weight is {_name(other)}; supported are {', '.join(map(_name, DTYPES))}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def require_own_method(module: nn.Module, attribute: str = "forward") -> None:
    """Raises Refused for a module whose method was replaced on the instance: by accelerate's hooks, by patches of others."""
    method = module.__dict__.get(attribute)
    if method is None or getattr(method, "__func__", None) is getattr(type(module), attribute, None):
        return
    if attribute in module.__dict__.get(OUR_PATCHES, {}):  # ours, or a wrapper put around ours
        return
    by = getattr(method, "__qualname__", type(method).__name__)
    raise NotNow(f"its {attribute} was replaced on the instance (by {by} of {getattr(method, '__module__', 'unknown origin')})")


def is_hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of them does more than its class's forward: it has hooks, or a forward of its own."""
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]:
            return True
        if "forward" in state:
            forward = state["forward"]
            if getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module:
                return True
    return False


def log_once(message: str) -> None:
    """Warns in the logger "moe_ext", once per message; not while a compiler traces."""
    if not torch.compiler.is_compiling():
        _log_once(message)


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    logging.getLogger("moe_ext").warning(message)

"""When a model's own code runs instead of ours, and saying so: once per reason, in the logger "moe_ext"."""

from __future__ import annotations

import functools
import logging
import os

import torch

DISABLE_VARIABLE = "MOE_EXT_DISABLE"


def disabled_by_environment() -> bool:
    """Whether MOE_EXT_DISABLE asks for the models' own code; read at each call (by a compiled graph: when it is traced)."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def autocast_is_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def log_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _log_once(message)


@functools.lru_cache(maxsize=1024)
def _log_once(message: str) -> None:
    logging.getLogger("moe_ext").warning(message)

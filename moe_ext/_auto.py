"""`auto`: wraps a loader so that the models it returns are already enabled.

    load = moe_ext.auto(AutoModelForCausalLM.from_pretrained)
    model = load("Qwen/Qwen3-30B-A3B", dtype="bfloat16")

Nothing is kept, neither on the model nor here. The reports go to the logger "moe_ext" and to `on_report`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ._enable import enable
from .report import EnableReport, NoExpertsFound

_Loader = TypeVar("_Loader", bound=Callable[..., Any])

#: The attribute of a loader made here that holds the one it was made from.
_WRAPPED = "_moe_ext_loader"


def auto(
    loader: _Loader, *, strict: bool = False, prove: bool = True, on_report: Callable[[EnableReport], object] | None = None
) -> _Loader:
    """Wraps a loader so that the models it returns are already enabled.

    A model without experts is returned as it is, with a warning in the logger "moe_ext". A loader that `auto` has made is not wrapped
    again: the new options replace the old ones.

    Args:
        loader: `from_pretrained`, `get_peft_model`, or a function of yours. It returns a model, or a tuple, list or dict with models.
        strict: As in `enable`. A model without experts then raises NoExpertsFound.
        prove: As in `enable`.
        on_report: Is called with the report of each model, for example `print`.

    Returns:
        A function that is called as the loader is and returns what the loader returns. It raises TypeError if that holds no model.
    """
    original: Any = getattr(loader, _WRAPPED, loader)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        for model in _models_in(loaded, original):
            report = _enable(model, strict, prove)
            if on_report is not None:
                on_report(report)
        return loaded

    setattr(load, _WRAPPED, original)
    return load  # type: ignore[return-value]


def _models_in(loaded: Any, loader: Any) -> list[nn.Module]:
    parts = loaded.values() if isinstance(loaded, dict) else loaded if isinstance(loaded, (tuple, list)) else (loaded,)
    models = [part for part in parts if isinstance(part, nn.Module)]
    if not models:
        name = getattr(loader, "__qualname__", type(loader).__name__)
        raise TypeError(f"moe_ext.auto wraps loaders of models, but {name} returned a {type(loaded).__name__} without any nn.Module")
    return models


def _enable(model: nn.Module, strict: bool, prove: bool) -> EnableReport:
    log = logging.getLogger("moe_ext")
    try:
        report = enable(model, strict=strict, prove=prove)
    except NoExpertsFound as error:
        if strict:
            raise
        log.warning("%s", error)
        return EnableReport(error.model, error.rejected, note=str(error))
    log.log(logging.WARNING if report.skipped else logging.INFO, "%s", report)
    return report

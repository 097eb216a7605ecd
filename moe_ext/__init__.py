"""moe_ext: the experts of Mixture-of-Experts models as one compiled op, `torch.ops.moe.grouped_forward`, proven on your model.

    import moe_ext
    report = moe_ext.enable(model)   # finds the experts, proves the compiled path computes the same, switches them over
    print(report)

Write your own model with `GroupedExperts`, or call `grouped_experts`. Importing this loads the compiled libraries; it imports no
model library and initialises no GPU. In a process that has imported it, transformers knows `experts_implementation="moe_ext"`.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    from . import ops as ops  # loads the libraries: first
    from . import reference as reference
    from . import testing as testing
    from ._auto import auto
    from ._enable import disable, enable, explain, patched, register
    from .experts import ExpertSpec, ExpertWeights, ListedWeights, StackedWeights
    from .functional import grouped_experts
    from .integrations.run.decorated import register_when_loaded as _register_when_loaded
    from .modules import GroupedExperts
    from .report import EnableError, EnableReport, NoExpertsFound

    _register_when_loaded()
except (ImportError, OSError, RuntimeError) as error:
    # Said now, raised again by every public name: the package itself stays importable, so that `moe-ext doctor` can say more.
    _load_failure = error
    warnings.warn(f"moe_ext cannot be used: {error} (`moe-ext doctor` says more)", RuntimeWarning, stacklevel=2)

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"moe_ext cannot be used: {_load_failure}") from _load_failure
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    __version__ = version("moe-ext")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = [
    "EnableError",
    "EnableReport",
    "ExpertSpec",
    "ExpertWeights",
    "GroupedExperts",
    "ListedWeights",
    "NoExpertsFound",
    "StackedWeights",
    "auto",
    "disable",
    "enable",
    "explain",
    "grouped_experts",
    "ops",
    "patched",
    "reference",
    "register",
    "testing",
]

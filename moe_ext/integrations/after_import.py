"""`after_import`: runs something as soon as a module of another package has been imported, without importing it.

A finder in front of `sys.meta_path` asks the finders behind it for the module, and has its loader call us once the module has run. The
finder stays: a module that is imported again is a new module. Any other import costs one comparison of strings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[], object]) -> None:
    """Calls `action` now if the module is loaded, and after each time that it is loaded from now on.

    Args:
        name: The full name of a module.
        action: What it raises, the import of the module raises.
    """
    # moe_ext itself may be loaded again: the finders of its earlier copy, of another class, go.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "_moe_ext_waits_for", None) != name]
    sys.meta_path.insert(0, _Finder(name, action))
    if sys.modules.get(name) is not None:
        action()


class _Finder(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._moe_ext_waits_for, self.action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._moe_ext_waits_for:
            return None
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        found = (finder.find_spec(name, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(Loader):
    """Stands for another loader until the module runs; the module then has that one, as if there had been nothing in between."""

    def __init__(self, loader: Any, action: Callable[[], object]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

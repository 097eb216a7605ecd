"""Whether what a formula was read from is still what it was: looked at in every call, before our code runs.

A formula is read from code, and from the numbers, strings and functions which that code reads. `Basis` keeps those. Reading them takes
milliseconds for a list of 128 experts; a look says in microseconds that nothing has changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..usable import Refused
from .code_reading import SIMPLE, Kind, Reading, Readings, Scope
from .look import ListLook, ModuleLook


@dataclass
class Basis:
    """What the formula of some modules was read from. The first `require` is the proof; the later ones compare with it."""

    scope: Scope = field(default_factory=Scope)
    kinds: frozenset[Kind] | None = None
    code: dict[str, Any] = field(default_factory=dict)
    look: ModuleLook | None = field(default=None, repr=False, compare=False)
    _reason: str | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"look": None, "_reason": None}  # a copy has modules of its own

    def require(self, module: nn.Module) -> None:
        """Raises Refused where what the formula of `module` was read from is no longer what it was."""
        if torch.compiler.is_compiling():
            reason = self._reason_traced(module)
        else:
            look = self.look
            if look is None or not look.holds(module):
                self.look = None
                look = self.remember(module)
            reason = self._reason
            if reason is None and look.modules and _has_any_global_hook():
                reason = "hooks are registered for the calls of all modules"
        if reason is not None:
            raise Refused(reason)

    def remember(self, module: nn.Module) -> ModuleLook:
        """Reads everything, compares it with the first time, and keeps both for the next look."""
        reading = Reading(self.scope)
        kind = reading.module(module)
        self._reason = self.compare(frozenset((kind,)), reading.code)
        if reading.hooked is not None and self._reason is None:
            self._reason = f"{reading.hooked} has hooks or a forward of its own"
        self.look = ModuleLook(module, reading, [name for name, _ in kind[2]])
        return self.look

    def require_list(self, modules: Sequence[nn.Module], names: Iterable[str]) -> ListLook:
        """As `require`, of the experts of a list; of their projections, which have these names, only the code counts."""
        reading = Reading(self.scope)
        names = frozenset(names)
        kinds = frozenset(reading.expert(module, names) for module in modules)
        reason = self.compare(kinds, reading.code)
        if reason is not None:
            raise Refused(reason)
        return ListLook(modules, reading, names)

    def require_traced(self, modules: Sequence[nn.Module]) -> None:
        """What `require_list` checks, of what an instance holds: a compiler guards the values that it sees here."""
        for module in modules:
            reasons = [_traced("an expert", module, own, below) for cls, own, below in self.kinds or () if cls is type(module)]
            if reasons and None not in reasons:
                raise Refused(reasons[0] or "")

    def compare(self, kinds: frozenset[Kind], code: dict[str, Any]) -> str | None:
        """What differs from the first call, as a sentence; None if nothing does."""
        if self.kinds is None:
            self.kinds, self.code = kinds, code
            return None
        other = next(iter(kinds - self.kinds), None)
        if other is not None:
            return _difference(other, self.kinds)
        changed = next((name for name, value in code.items() if self.code.setdefault(name, value) != value), None)
        return None if changed is None else f"{changed} is another than when it was proven"

    def _reason_traced(self, module: nn.Module) -> str | None:
        """The same of what an instance holds, in plain steps: a compiler guards the values that it sees here."""
        if self.kinds is None:
            return None
        for _, readings, children in self.kinds:
            reason = _traced("it", module, readings, children)
            if reason is not None:
                return reason
        return None


def _traced(name: str, module: nn.Module, readings: Readings, children: tuple[tuple[str, Any], ...]) -> str | None:
    for attribute, value in readings:
        if value is not None and type(value) not in SIMPLE:
            continue
        now: Any = module
        for part in attribute.split("."):
            now = getattr(now, part, None)
        if now != value:
            return f"{attribute} of {name} is another than when it was proven"
    for child_name, (cls, own, below) in children:
        child: Any = getattr(module, child_name, None)
        if type(child) is not cls or len(child._forward_hooks) or len(child._forward_pre_hooks):
            return f"its {child_name} is another than when it was proven, or has hooks"
        reason = _traced(child_name, child, own, below)
        if reason is not None:
            return reason
    return None


def _difference(kind: Kind, proven: Iterable[Kind]) -> str:
    cls, readings, children = kind
    same = [k for k in proven if k[0] is cls]
    if not same:
        return f"it is a {cls.__name__}, which none was when it was proven"
    _, old_readings, old_children = same[0]
    old = dict(old_readings)
    for name, value in readings:
        if name not in old or old[name] != value:
            was = f", which was {old[name]!r}" if type(value) in SIMPLE and type(old.get(name)) in SIMPLE else ""
            now = f" {value!r}" if was else " another"
            return (
                f"the {name} of a {cls.__name__} is{now}{was} when it was proven"
                if was
                else f"its {name} is another than when it was proven"
            )
    before = dict(old_children)
    for name, child in children:
        if name not in before:
            return f"a {cls.__name__} has a {name}, which none had when it was proven"
        if before[name] != child:
            if before[name][0] is not child[0]:
                return f"its {name} is another than when it was proven, a {child[0].__name__}"
            return _difference(child, [before[name]])
    return f"a {cls.__name__} lacks what it had when it was proven"

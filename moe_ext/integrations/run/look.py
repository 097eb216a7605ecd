"""Saying in microseconds that nothing has changed: what a reading found, compared by the interpreter's own loops.

Nothing here keeps an expert or its tensors alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .code_reading import Reading

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_state_of, _code_of, _modules_of = attrgetter("__dict__"), attrgetter("__code__"), itemgetter("_modules")


class _Look:
    """What a reading found, in a form in which "nothing has changed" is a few loops without bytecode."""

    def __init__(self, reading: Reading) -> None:
        self.died: list[Any] = []
        self.fixed = [(itemgetter(*keys), mapping) for mapping, keys in reading.mappings.values()]
        self.functions = list(reading.functions.values())
        self.codes = list(map(_code_of, self.functions))
        self.sized: list[Any] = list(map(vars, reading.classes))
        self.collections = reading.collections
        self.contents = [type(c)(c) for c in self.collections]

    def _finish(self) -> None:
        self.values = [get(mapping) for get, mapping in self.fixed]
        self.sizes = list(map(len, self.sized))

    def _read_hooks(self, states: Iterable[dict[str, Any]]) -> None:
        """The dictionaries of hooks. They may be replaced, which shows in them only when the next hook is registered."""
        self.registered = RemovableHandle.next_id
        self.hooks = [state[name] for state in states for name in HOOKS]
        self.before = [dict(h) for h in self.hooks] if any(self.hooks) else None

    def _code_holds(self) -> bool:
        return (
            [get(mapping) for get, mapping in self.fixed] == self.values
            and list(map(_code_of, self.functions)) == self.codes
            and list(map(len, self.sized)) == self.sizes
            and self.collections == self.contents
            and (not any(self.hooks) if self.before is None else self.hooks == self.before)
        )


class ModuleLook(_Look):
    """Of one module and the children that its code names, which it may keep alive: they are activations, and no experts."""

    def __init__(self, module: nn.Module, reading: Reading, wanted: Sequence[str]) -> None:
        super().__init__(reading)
        state = module.__dict__
        self.cls, self.size = type(module), len(state)
        self.ref = weakref.ref(module)
        keys = tuple(k for k in reading.keys.get(self.cls, ()) if k in state)
        self.get_own = itemgetter(*keys) if keys else len
        self.own = self.get_own(state)
        self.get_children = itemgetter(*wanted) if wanted else None
        self.children = self.get_children(state["_modules"]) if self.get_children is not None else None
        below = list(dict.fromkeys(m for name in wanted for m in state["_modules"][name].modules()))
        self.modules, self.types = below, list(map(type, below))
        self.states = [m.__dict__ for m in below]
        for m in below:
            keys = _keys(reading, type(m), m.__dict__)
            if keys:
                self.fixed.append((itemgetter(*keys), m.__dict__))
            if m._modules:
                self.fixed.append((itemgetter(*m._modules), m._modules))
        self.sized += [*self.states, *(state["_modules"] for state in self.states)]
        self._read_hooks(self.states)
        self._finish()

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        state = module.__dict__
        if self.registered != RemovableHandle.next_id:
            self._read_hooks(self.states)
            if self.before is not None:
                return False
        try:
            return (
                self.ref() is module
                and type(module) is self.cls
                and len(state) == self.size
                and self.get_own(state) == self.own
                and (self.get_children is None or self.get_children(state["_modules"]) == self.children)
                and list(map(type, self.modules)) == self.types
                and self._code_holds()
            )
        except (KeyError, RuntimeError):  # an attribute was deleted, or is a tensor now
            return False


class _Level:
    """Modules that stand at one depth, as they were."""

    def __init__(self, modules: Sequence[nn.Module], reading: Reading) -> None:
        states = [m.__dict__ for m in modules]
        self.ids, self.types, self.sizes = list(map(id, modules)), list(map(type, modules)), list(map(len, states))
        self.names = list(chain.from_iterable(map(_modules_of, states)))
        by_keys: dict[tuple[str, ...], list[int]] = {}
        for i, (cls, state) in enumerate(zip(self.types, states, strict=True)):
            keys = _keys(reading, cls, state)
            if keys:
                by_keys.setdefault(keys, []).append(i)
        self.cells = [(_picker(places), itemgetter(*keys)) for keys, places in by_keys.items()]
        self.values = [list(map(get, pick(states))) for pick, get in self.cells]

    def holds(self, modules: Sequence[nn.Module], states: Sequence[dict[str, Any]]) -> bool:
        return (
            list(map(id, modules)) == self.ids
            and list(map(type, modules)) == self.types
            and list(map(len, states)) == self.sizes
            and list(chain.from_iterable(map(_modules_of, states))) == self.names
            and [list(map(get, pick(states))) for pick, get in self.cells] == self.values
        )


def _keys(reading: Reading, cls: type, state: dict[str, Any]) -> tuple[str, ...]:
    """The attributes to compare: what its code reads, and a forward of its own."""
    return tuple(dict.fromkeys(k for k in (*reading.keys.get(cls, ()), "forward") if k in state))


def _picker(places: list[int]) -> Callable[[Any], Any]:
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class ListLook(_Look):
    """Of a list of modules and their children, and of all below that but projections, which are the readers' business.

    None is kept alive: they are compared by their ids, which nothing else can have while `died` is empty.
    """

    def __init__(self, modules: Sequence[nn.Module], reading: Reading, projections: frozenset[str]) -> None:
        super().__init__(reading)
        self.levels: list[_Level] = []
        self.deeper: Callable[[Any], Any] | None = None
        everything: list[nn.Module] = []
        level = list(modules)
        while level:
            self.levels.append(_Level(level, reading))
            everything += level
            if len(self.levels) == 2:
                named = [n for m in modules for n, child in m._modules.items() if child is not None]
                places = [i for i, (n, m) in enumerate(zip(named, level, strict=True)) if n not in projections and m._modules]
                self.deeper = _picker(places) if places else None
                level = [level[i] for i in places]
            level = _below([m.__dict__ for m in level])
        self.refs = [weakref.ref(m, self.died.append) for m in everything]
        self._read_hooks(m.__dict__ for m in everything)
        self._finish()

    def states(self, level: Sequence[nn.Module]) -> list[list[dict[str, Any]]] | None:
        """The attributes of the modules of each level, if everything is as it was."""
        try:
            if self.died or not self._code_holds():
                return None
            found = []
            for known in self.levels:
                states = list(map(_state_of, level))
                if not known.holds(level, states):
                    return None
                found.append(states)
                if len(found) < len(self.levels):
                    level = _below(states if len(found) != 2 or self.deeper is None else self.deeper(states))
        except (KeyError, RuntimeError):  # an attribute was deleted, or is a tensor now
            return None
        if self.registered != RemovableHandle.next_id:
            self._read_hooks(chain.from_iterable(found))
            if self.before is not None:
                return None
        return found


def _below(states: Sequence[dict[str, Any]]) -> list[nn.Module]:
    found: list[Any] = list(chain.from_iterable(map(dict.values, map(_modules_of, states))))
    return [m for m in found if m is not None] if None in found else found

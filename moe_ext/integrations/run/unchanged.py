"""Whether what a formula was read from is still what it was: looked at in every call, before our code runs.

A formula is read from code, and from the numbers, strings and functions which that code reads. `Basis` keeps those. `read` collects
them, which takes milliseconds for a list of 128 experts; a look says in microseconds that nothing has changed since. Nothing here
keeps a module or a tensor alive.
"""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import container
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from ..usable import Refused

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: What code reads, in a form that can be compared and pickled: names with numbers, strings, and digests of code.
Readings: TypeAlias = tuple[tuple[str, Any], ...]
#: A module as code reads it: its class, its readings, and its children by name.
Kind: TypeAlias = tuple[type, Readings, tuple[tuple[str, Any], ...]]

_state_of = attrgetter("__dict__")
_modules_of = itemgetter("_modules")
_code_of = attrgetter("__code__")
#: Attributes that decide which code is called, not what it computes: whoever reads a `Basis` was called.
_DISPATCH = frozenset({"training", "_experts_implementation", "_experts_implementation_internal", "dtype", "device"})
_CONTAINERS = tuple(c for c in vars(container).values() if isinstance(c, type) and issubclass(c, nn.Module) and c is not nn.Module)


@dataclass(frozen=True)
class Scope:
    """Which code the formula was read from.

    roots: the methods whose code it is. skip: attributes that our code reads anew at each call. only: if given, the attributes of the
    module itself, and the variables around its method, that count, whatever else its code reads.
    """

    roots: tuple[str, ...] = ("forward",)
    skip: frozenset[str] = frozenset()
    only: frozenset[str] | None = None


# --------------------------------------------------------------------------------------------------------------------------- basis
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
        if "." not in attribute and (value is None or type(value) in _SIMPLE) and getattr(module, attribute, None) != value:
            return f"{attribute} of {name} is another than when it was proven"
    for child_name, (cls, own, below) in children:
        child = getattr(module, child_name, None)
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
            was = f", which was {old[name]!r}" if type(value) in _SIMPLE and type(old.get(name)) in _SIMPLE else ""
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


# ------------------------------------------------------------------------------------------------------------------------- reading
class Reading:
    """Collects what the code of modules reads, and where it is read from."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.code: dict[str, Any] = {}
        self.functions: dict[int, types.FunctionType] = {}
        self.mappings: dict[int, tuple[Any, dict[str, None]]] = {}
        self.classes: dict[type, None] = {}
        self.keys: dict[type, tuple[str, ...]] = {}  # of the instances of a class, where all have the same
        self.collections: list[Any] = []
        self.hooked: str | None = None
        self._root: Any = None
        self._names: dict[tuple[type, tuple[str, ...]], frozenset[str]] = {}

    def module(self, module: nn.Module) -> Kind:
        """The kind of a module, with the children that its code names."""
        cls, root = class_of(module), self.scope.roots[0]
        self._root = getattr(cls, root, None)
        readings = self.readings(module, self.scope.roots, self.scope.only, root)  # ours, or a wrapper that has called us
        names = self.names(cls, self.scope.roots)
        names = names if self.scope.only is None else names & self.scope.only
        whole = isinstance(module, _CONTAINERS) or "getattr" in names
        wanted = [n for n in module._modules if (whole or n in names) and n not in self.scope.skip]
        return cls, readings, self.children(module, wanted)

    def expert(self, module: nn.Module, projections: frozenset[str]) -> Kind:
        """The kind of an expert, with its children but for the projections."""
        for name in projections & module._modules.keys():
            child = module._modules[name]
            for one in (child, None if child is None else child._modules.get("base_layer")):
                if one is not None:
                    self.names(type(one), ("forward",))
        wanted = [n for n in module._modules if n not in projections]
        return type(module), self.readings(module, ("forward",), None), self.children(module, wanted)

    def children(self, module: nn.Module, wanted: Iterable[str]) -> tuple[tuple[str, Kind], ...]:
        found = []
        for name in wanted:
            child = module._modules[name]
            if child is not None:
                found.append((name, self.below(child, name)))
        return tuple(found)

    def below(self, module: nn.Module, name: str) -> Kind:
        """The kind of a module whose forward is called by code that was read, with all its children."""
        state = module.__dict__
        if self.hooked is None and ("forward" in state or any(state[h] for h in HOOKS)):
            self.hooked = f"its {name}"
        return type(module), self.readings(module, ("forward",), None), self.children(module, module._modules)

    def readings(self, instance: Any, roots: tuple[str, ...], only: frozenset[str] | None, but: str = "") -> Readings:
        """What the code of its class reads from an instance, other than tensors and modules."""
        names = self.names(class_of(instance), roots)
        state = vars(instance)
        found, keys = [], []
        counted = (names if only is None else names & only) - self.scope.skip - {but}
        for name, value in state.items():
            if name not in counted or isinstance(value, (Tensor, nn.Module)):
                continue
            for function in _functions(value):
                self._function(function)
            keys.append(name)
            if isinstance(value, (list, dict, set)):
                self.collections.append(value)
            found.append((name, portable(value)))
            if _is_record(value):
                found += [(f"{name}.{n}", v) for n, v in self.record(value, names)]
        self.keys[type(instance)] = tuple(dict.fromkeys((*self.keys.get(type(instance), ()), *keys)))
        return tuple(found)

    def record(self, value: Any, names: frozenset[str]) -> Readings:
        """Of an object that is no module: what those who hold it read by name, and what it reads when it is called."""
        own = names | (self.names(type(value), ("__call__",)) if callable(value) else frozenset())
        state = vars(value)
        keys = [n for n, v in state.items() if n in own and n not in _DISPATCH and (type(v) in _SIMPLE or v is None or callable(v))]
        keys = [n for n in keys if not isinstance(state[n], nn.Module)]
        if keys:
            self.watch(state, keys)
        return tuple((n, portable(state[n])) for n in keys)

    def watch(self, mapping: Any, keys: Iterable[str]) -> None:
        self.mappings.setdefault(id(mapping), (mapping, {}))[1].update(dict.fromkeys(keys))

    def names(self, cls: type, roots: tuple[str, ...]) -> frozenset[str]:
        """Every name that the code reachable from these methods reads; that code is added to `code`."""
        known = self._names.get((cls, roots))
        if known is None:
            seen: dict[str, None] = {}
            owners = [c for c in cls.__mro__ if c not in (nn.Module, object)]
            waiting = list(roots)
            while waiting:
                name = waiting.pop()
                if name in seen or name in self.scope.skip or name in _DISPATCH:
                    continue
                seen[name] = None
                owner = next((c for c in owners if name in vars(c)), None)
                if owner is None:
                    continue
                value = vars(owner)[name]
                self.watch(vars(owner), [name])
                self.classes[owner] = None
                self.code[f"the code of {owner.__qualname__}.{name}" if _functions(value) else f"{owner.__qualname__}.{name}"] = portable(
                    value
                )
                for function in _functions(value):
                    waiting += self._function(function)
            known = self._names[cls, roots] = frozenset(seen)
            for c in owners:
                self.classes[c] = None
        return known

    def _function(self, function: types.FunctionType) -> list[str]:
        """The names in its code, and in that of the functions of its module which it calls."""
        if id(function) in self.functions:
            return list(_names_of(function.__code__))
        self.functions[id(function)] = function
        names = list(_names_of(function.__code__))
        variables = function.__globals__
        # What is left of a method whose loop alone is replaced reads its variables anew.
        counted = names if self.scope.only is None or function is not self._root else [n for n in names if n in self.scope.only]
        known = [n for n in counted if n in variables and not isinstance(variables[n], (Tensor, nn.Module))]
        if known:
            self.watch(variables, known)
        more = []
        for name in known:
            value = variables[name]
            self.code[f"{name} of {function.__module__}"] = (
                type(value).__name__ if isinstance(value, (list, dict, set)) else portable(value)
            )
            if not str(function.__module__).startswith("torch."):
                for called in _functions(value):
                    if called.__globals__ is variables:
                        more += self._function(called)
        return names + more


def class_of(instance: Any) -> type:
    """The class whose code an instance has: a parametrization puts one of its own before that."""
    cls = type(instance)
    return cls.__bases__[0] if isinstance(instance, nn.Module) and "parametrizations" in instance._modules else cls


def _functions(value: Any) -> list[types.FunctionType]:
    """The plain functions in a method, property or wrapper, and those that they were put around."""
    found: list[types.FunctionType] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (staticmethod, classmethod, types.MethodType)):
            waiting.append(one.__func__)
        elif isinstance(one, property):
            waiting.append(one.fget)
        elif isinstance(one, functools.partial):
            waiting.append(one.func)
        elif isinstance(one, types.FunctionType) and one not in found:
            found.append(one)
            waiting += [_content(cell) for cell in one.__closure__ or ()]
    return found


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
        elif isinstance(constant, str) and constant.isidentifier():  # of getattr
            yield constant


_SIMPLE = (bool, int, float, complex, str, bytes)


def _is_record(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)
    )


def portable(value: Any, depth: int = 2) -> Any:
    """A value in a form that is equal for what computes the same, can be hashed and pickled, and keeps nothing alive."""
    if value is None or type(value) in _SIMPLE:
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return "value", str(value)
    if isinstance(value, (tuple, list, set)) and len(value) <= 64:
        return type(value).__name__, tuple(portable(v, depth) for v in value)
    if isinstance(value, dict) and len(value) <= 64 and depth:
        return "dict", tuple((str(k), portable(v, depth - 1)) for k, v in value.items())
    if isinstance(value, types.FunctionType):
        inside = tuple(portable(_content(c), depth - 1) for c in value.__closure__ or ()) if depth else ()
        return digest(value.__code__), portable(value.__defaults__, 0), portable(value.__kwdefaults__, 0), inside
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return type(value).__name__, portable(value.__func__, depth)
    if isinstance(value, property):
        return "property", portable(value.fget, depth)
    if isinstance(value, functools.partial):
        return "partial", portable(value.func, depth), portable(value.args, depth), portable(value.keywords, depth)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return "name", f"{value.__module__}.{value.__qualname__}"
    return "instance of", f"{type(value).__module__}.{type(value).__qualname__}"


def digest(code: types.CodeType) -> str:
    """Of what code computes, not of where it stands."""
    parts = [code.co_code, repr(code.co_names).encode(), repr(code.co_varnames).encode(), repr(code.co_freevars).encode()]
    parts += [(digest(c) if isinstance(c, types.CodeType) else repr(c)).encode() for c in code.co_consts if not isinstance(c, frozenset)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------------- look
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
            keys = tuple(k for k in reading.keys.get(type(m), ()) if k in m.__dict__)
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
            keys = tuple(k for k in reading.keys.get(cls, ()) if k in state)
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


def _picker(places: list[int]) -> Callable[[Any], Any]:
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))


class ListLook(_Look):
    """Of a list of modules and their children, and of all below that but projections, which are the readers' business. None is kept alive: they are compared by their ids, which nothing else can have
    while `died` is empty.
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

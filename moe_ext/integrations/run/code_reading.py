"""What code reads: the names in it, and the numbers, strings and functions behind those names, in a form that can be compared.

Nothing here keeps a module or a tensor alive.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import container

from ..usable import is_hooked

#: Names with numbers, strings, and digests of code.
Readings: TypeAlias = tuple[tuple[str, Any], ...]
#: A module as code reads it: its class, its readings, and its children by name.
Kind: TypeAlias = tuple[type, Readings, tuple[tuple[str, Any], ...]]

#: Values that are compared as they are.
SIMPLE = (bool, int, float, complex, str, bytes)
#: Attributes that decide which code is called, not what it computes.
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
        if self.hooked is None and is_hooked(module):
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
            if isinstance(value, types.MethodType) and value.__self__ is instance and value.__func__ is getattr(type(instance), name, None):
                continue  # its own method, as accelerate puts it back
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
        keys = [n for n, v in state.items() if n in own and n not in _DISPATCH and (type(v) in SIMPLE or v is None or callable(v))]
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
    """The class whose code an instance has: a parametrization and FSDP put classes of their own before that."""
    cls = next((c for c in type(instance).__mro__ if not c.__module__.startswith("torch.distributed.")), type(instance))
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


def _is_record(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)
    )


def portable(value: Any, depth: int = 2) -> Any:
    """A value in a form that is equal for what computes the same, can be hashed and pickled, and keeps nothing alive."""
    if value is None or type(value) in SIMPLE:
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

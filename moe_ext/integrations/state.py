"""What can be reached from a module and can be written: walked once, compared and put back later, or copied.

A module's attributes hold numbers, tensors, collections, objects, functions that close over more of them, other modules. Each of them
is visited once, whatever holds it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

#: The types of values that nothing can write.
_FIXED = {
    int, float, complex, bool, str, bytes, range, slice, type, type(None), type(...), types.BuiltinFunctionType, types.ModuleType,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
}  # fmt: skip

#: Whose objects look after themselves: nothing is looked for in them. What our own remember of a model is read anew where it differs.
_LIBRARIES = (
    "bitsandbytes.", "torch._C", "torch.distributed", "torch.cuda", "logging", "threading", "moe_ext.integrations.run.unchanged",
    "moe_ext.integrations.run.look", "moe_ext.integrations.run.code_reading",
)  # fmt: skip

#: The attribute by which a copied module leads to the sandbox that it is in.
BOX = "_moe_ext_box"

#: Attributes by which `nn.Module` itself works, and ours.
INTERNAL = frozenset((*vars(nn.Module()), BOX))
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in INTERNAL if name.endswith("_hooks"))
_PLAIN_TENSORS = (Tensor, nn.Parameter)

#: Tensors of at most so many bytes are copied without being asked for: routers, counters, adapters, but no experts of a real model.
SMALL = 1 << 20


def storage_of(t: Tensor) -> int | None:
    """What tells one storage from another; None for tensors without one."""
    return t.untyped_storage()._cdata if type(t) in _PLAIN_TENSORS and t.layout is torch.strided else None


def has_attributes(value: Any) -> bool:
    """Whether `value` is an object with attributes of its own, and not a class, a function or part of a library that looks after itself."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, types.FunctionType, types.ModuleType, Tensor))
        and not type(value).__module__.startswith(_LIBRARIES)
    )


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` holds, by name."""
    if isinstance(value, nn.Module):
        state = value.__dict__
        yield from ((name, v) for name, v in state.items() if name not in INTERNAL)
        for table in _TABLES:
            yield from state.get(table, {}).items()
        return
    if isinstance(value, dict):
        yield from ((f"[{k!r}]", v) for k, v in dict.items(value))
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{i}]", v) for i, v in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from ((name, cell.cell_contents) for name, cell in closure_of(value))
    elif isinstance(value, types.MethodType):
        yield "__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, weakref.ref):
        yield "()", value()
    if has_attributes(value) and not isinstance(value, (types.MethodType, functools.partial)):
        yield from vars(value).items()


def closure_of(function: Any) -> list[tuple[str, Any]]:
    """The cells of a function that are filled, by the names of their variables."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return [(name, cell) for name, cell in cells if _is_filled(cell)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises where it is empty)
    except ValueError:
        return False
    return True


def _own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that belong to the model and not to a library."""
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "moe_ext", "builtins", "abc", "typing")
    return [c for c in type(module).__mro__ if c.__module__.partition(".")[0] not in libraries]


class State:
    """All that can be written below a module, as it is when this is made.

    contents: of which tensors the values are remembered too; the others are known by their storage and their version.
    """

    def __init__(self, root: Any, contents: Callable[[Tensor], bool] = lambda _: False) -> None:
        self.namespaces: list[tuple[str, dict[Any, Any], dict[Any, Any]]] = []
        self.collections: list[tuple[str, Any, Any]] = []
        self.classes: dict[type, dict[str, Any]] = {}
        self.generators: list[tuple[str, Any, Any]] = []
        self.tensors: list[tuple[str, Tensor, Tensor, tuple[Any, ...], Tensor | None]] = []
        self.kept: list[Any] = []  # an id is that of a visited object only as long as that lives
        with torch._C.DisableTorchFunctionSubclass():
            self._visit(root, contents)

    def _visit(self, root: Any, contents: Callable[[Tensor], bool]) -> None:
        seen: set[int] = set()
        todo: list[tuple[str, Any]] = [("", root)]
        while todo:
            path, value = todo.pop()
            if type(value) in _FIXED or id(value) in seen:
                continue
            seen.add(id(value))
            self.kept.append(value)
            if isinstance(value, Tensor):
                self._visit_tensor(path, value, contents)
                continue
            if isinstance(value, nn.Module):
                state = value.__dict__
                self.namespaces.append((path, state, dict(state)))
                tables = (state[name] for name in (*_TABLES, *_HOOKS) if state.get(name))
                self.namespaces.extend((path, table, dict(table)) for table in tables)
                for cls in _own_classes(value):
                    if cls not in self.classes:
                        self.classes[cls] = own = {n: v for n, v in vars(cls).items() if n[:2] != "__" and _is_data(v)}
                        todo.extend((f"{cls.__qualname__}.{n}", v) for n, v in own.items())
            elif isinstance(value, dict):
                self.namespaces.append((path, value, dict(dict.items(value))))
            elif isinstance(value, (list, set, deque, bytearray)):
                self.collections.append((path, value, copy.copy(value)))
            elif isinstance(value, (random.Random, torch.Generator)):
                self.generators.append((path, value, value.getstate() if isinstance(value, random.Random) else value.get_state()))
                continue
            elif isinstance(value, types.FunctionType) and not value.__closure__:
                continue
            elif has_attributes(value):
                self.namespaces.append((path, vars(value), dict(vars(value))))
            members = [(n, v) for n, v in _members(value) if type(v) not in _FIXED]
            todo.extend((f"{path}.{n}" if path and n[:1] != "[" else f"{path}{n}", v) for n, v in reversed(members))

    def _visit_tensor(self, path: str, t: Tensor, contents: Callable[[Tensor], bool]) -> None:
        if type(t) not in _PLAIN_TENSORS or t.layout is not torch.strided:
            return
        alias = t.detach()
        self.tensors.append((path, t, alias, _facts(t), alias.clone() if contents(t) else None))

    def put_back(self, is_written: Callable[[Tensor], bool] | None = None) -> list[str]:
        """Makes everything what it was; the names of what was not. is_written: asked instead of comparing the values."""
        changed: list[str] = []
        for path, namespace, before in self.namespaces:
            if len(namespace) != len(before) or not all(map(is_, namespace.values(), before.values())):
                names = [n for n in dict.fromkeys([*before, *namespace]) if dict.get(namespace, n, before) is not before.get(n, namespace)]
                changed += [f"{path}.{n}".lstrip(".") for n in names or ["keys"]]
                namespace.clear()
                namespace.update(before)
        for path, collection, items in self.collections:
            if len(collection) != len(items) or not (collection == items if isinstance(items, set) else all(map(is_, collection, items))):
                changed.append(path)
                collection.clear()
                (collection.update if isinstance(collection, set) else collection.extend)(items)
        for cls, before in self.classes.items():
            for name, value in before.items():
                if vars(cls).get(name) is not value:
                    changed.append(f"{cls.__qualname__}.{name}")
                    setattr(cls, name, value)
        for path, generator, state in self.generators:
            if isinstance(generator, random.Random):
                if generator.getstate() != state:
                    changed.append(path)
                    generator.setstate(state)
            elif not torch.equal(generator.get_state(), state):
                changed.append(path)
                generator.set_state(state)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            for path, t, alias, facts, values in self.tensors:
                if self._put_back_tensor(t, alias, facts, values, is_written):
                    changed.append(path)
        return changed

    @staticmethod
    def _put_back_tensor(
        t: Tensor, alias: Tensor, facts: tuple[Any, ...], values: Tensor | None, is_written: Callable[[Tensor], bool] | None
    ) -> bool:
        changed = False
        if values is not None and (is_written(alias) if is_written is not None else not _equal(alias, values)):
            alias.data.copy_(values)  # no graph that was recorded meanwhile is told
            changed = True
        now = _facts(t)
        if now == facts:
            return changed
        data, version, requires_grad, grad = facts
        if now[0] != data:
            t.data = alias
        if now[2] != requires_grad and t.is_leaf:
            t.requires_grad_(requires_grad)
        if t.is_leaf and t.grad is not grad:
            t.grad = grad
        return True


def _facts(t: Tensor) -> tuple[Any, ...]:
    """Where its values are, how often they were written, and what autograd keeps of it."""
    return t.data_ptr(), None if t.is_inference() else t._version, t.requires_grad, t.grad if t.is_leaf else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _is_data(value: Any) -> bool:
    return not (callable(value) or inspect.isdatadescriptor(value) or isinstance(value, (classmethod, staticmethod)))


# ------------------------------------------------------------------------------------------------------------------------- copies
class Copies:
    """Copies of modules and of all that can be reached from them, made so that nothing done to a copy reaches the original.

    Small tensors are copied; the storage of larger ones is shared unless `whole` is set. `names` are the originals' storages by name
    of what they were first met in. What cannot be copied (locks, streams, process groups) is shared.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.made: dict[int, Any] = {}
        self.names: dict[int, str] = {}
        self._storages: dict[int, Any] = {}
        self._kept: list[Any] = []

    def of(self, value: Any, name: str = "") -> Any:
        """The copy of `value`, always the same one."""
        if type(value) in _FIXED:
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        self._kept.append(value)
        made = self._copy(value, name)
        self.made.setdefault(id(value), made)
        return self.made[id(value)]

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, nn.Module):
            return value if isinstance(value, torch.jit.ScriptModule) else self._module(value, name)
        if isinstance(value, tuple):
            items = [self.of(v, name) for v in value]
            return value if all(map(is_, items, value)) else value._make(items) if hasattr(value, "_make") else type(value)(items)
        if isinstance(value, types.FunctionType):
            return self._function(value, name)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__, name))
        if type(value) is functools.partial:
            keywords = {k: self.of(v, name) for k, v in value.keywords.items()}
            return functools.partial(self.of(value.func, name), *(self.of(v, name) for v in value.args), **keywords)
        if isinstance(value, weakref.ref):
            target = value()
            return value if target is None or type(value) is not weakref.ref else weakref.ref(self.of(target, name))
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, (dict, list, deque, set)) or has_attributes(value):
            return self._object(value, name)
        try:
            return copy.copy(value)
        except Exception:  # it says that it cannot be copied, and whoever holds it shares it
            return value

    def _module(self, module: nn.Module, name: str) -> nn.Module:
        twin = self.made[id(module)] = object.__new__(type(module))
        state = twin.__dict__
        for n, v in module.__dict__.items():
            state[n] = type(v)() if n in _HOOKS else v
        prefix = f"{name}." if name else ""
        for table in _TABLES:
            values = module.__dict__.get(table)
            if values is not None:
                state[table] = type(values)() if type(values) is not dict else {}
                state[table].update((n, self.of(v, f"{prefix}{n}")) for n, v in values.items())
        for n in [n for n, v in state.items() if n not in INTERNAL and type(v) not in _FIXED]:
            state[n] = self.of(state[n], f"{prefix}{n}")
        if "_non_persistent_buffers_set" in state:
            state["_non_persistent_buffers_set"] = set(state["_non_persistent_buffers_set"])
        return twin

    def _object(self, value: Any, name: str) -> Any:
        try:
            made = copy.copy(value)
        except Exception:  # as above
            return value
        if made is value:
            return value
        self.made[id(value)] = made
        if isinstance(made, dict):
            for k in list(made):
                dict.__setitem__(made, k, self.of(made[k], name))
        elif isinstance(made, (list, deque)):
            for i, v in enumerate(list(made)):
                made[i] = self.of(v, name)
        if has_attributes(made):
            for n, v in list(vars(made).items()):
                if type(v) not in _FIXED:
                    vars(made)[n] = self.of(v, f"{name}.{n}")
        return made

    def _function(self, function: Any, name: str) -> Any:
        cells = closure_of(function)
        if not cells or len(cells) != len(function.__closure__):
            return function
        made = [self.of(cell.cell_contents, name) for _, cell in cells]
        if all(new is cell.cell_contents for new, (_, cell) in zip(made, cells, strict=True)):
            return function
        closure = tuple(types.CellType(new) for new in made)
        twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
        twin.__kwdefaults__ = function.__kwdefaults__
        twin.__dict__.update(function.__dict__)
        return twin

    def _tensor(self, t: Tensor, name: str) -> Any:
        key = storage_of(t)
        if key is None or t.is_meta:
            return t
        self.names.setdefault(key, name)
        if key not in self._storages:
            storage = t.untyped_storage()
            self._storages[key] = _clone(t) if self.whole or storage.nbytes() <= SMALL else storage
        # A tensor of its own, also where the original was made in inference mode and could be saved for no backward.
        twin = torch.empty(0, dtype=t.dtype, device=t.device).set_(self._storages[key], t.storage_offset(), t.shape, t.stride())
        if isinstance(t, nn.Parameter):
            return nn.Parameter(twin, requires_grad=t.requires_grad)
        return twin


def _clone(t: Tensor) -> Any:
    """A copy of the storage of a tensor."""
    storage = t.untyped_storage()
    if storage.nbytes() == t.nbytes and t.is_contiguous():
        return t.detach().clone().untyped_storage()  # half the time
    return storage.clone()

"""Methods of model code that route inline and then loop over their experts: the loop alone is replaced, in a copy of their code.

    logits = self.gate(x) ...            stays: the model's router, noise, casts
    mask = one_hot(index) ...            dropped: nothing but the loop read it
    for e in hit: out.index_add_(...)    out = experts(x, index, weights)
    return out + self.shared(x), logits  stays: shared experts, what is returned

The copy is made from the method's source and runs among the globals of the original, so whatever it calls is still the model's own.
Which variables hold the routing is seen on a run (`routing.readings`) and proven like everything else.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..usable import Refused
from .routing import Routing, readings

_PROBE = "probe"
_EXPERTS = "experts"


@dataclass(frozen=True)
class Loop:
    """The loop of a method: its number among those over experts, and the variable that it fills.

    keeps: rows of that variable which no expert computes keep what they held before; adds: all do, and experts add to it.
    apart: the variable holds what each expert adds, `[E, ..., H]`, and is summed behind the loop: the first gets the whole sum.
    """

    number: int
    result: str
    keeps: bool = False
    adds: bool = False
    apart: int = 0


def find(cls: Any, attribute: str, container: str) -> int:
    """How many loops over `self.<container>` there are in a method; raises Refused where its code cannot be had."""
    return len(_loops(_source(cls, attribute), container))


def observe(module: nn.Module, attribute: str, container: str, number: int, *args: Any) -> dict[str, Any]:
    """The local variables before a loop, on a run of the method that ends there; empty if it is not reached."""
    seen: dict[str, Any] = {}

    class _Reached(BaseException):
        pass

    def probe(values: Mapping[str, Any]) -> None:
        seen.update(values)
        raise _Reached

    cls: Any = type(module)
    method = _probed(cls, attribute, container, number, *_version(cls, attribute))
    try:
        method(module, *args, **{_PROBE: probe})
    except _Reached:
        seen.pop("self", None)
    return seen


def candidates(
    cls: type, attribute: str, container: str, number: int, values: Mapping[str, Any], hidden: int, experts: int, identity: bool
) -> Iterator[tuple[Loop, Routing]]:
    """Every reading of the variables before the loop, with every variable that the loop may fill."""
    function = _source(cls, attribute)
    loop = _loops(function, container)[number][1]
    inside, behind = _names(loop), _names_behind(function, loop)
    for routing in readings(values, hidden, experts, identity):
        x = values[routing.hidden_states]
        for name in sorted(inside & behind - set(routing.names)):
            result = values.get(name)
            if not isinstance(result, Tensor) or not result.is_floating_point():
                continue
            if result.shape == (experts, *x.shape):
                yield Loop(number, name, apart=experts), routing
            if result.shape == x.shape:
                yield Loop(number, name), routing
                if not bool((result == 0).all()):
                    yield Loop(number, name, adds=True), routing
                    yield Loop(number, name, keeps=True), routing


# -------------------------------------------------------------------------------------------------------------------------- source
def without(cls: Any, attribute: str, container: str, loop: Loop, routing: Routing) -> Callable[..., Any]:
    """The method with its loop replaced by a call of its keyword argument `experts`.

    That is given the values that hold the routing, by name, and returns rows in the shape of the hidden states.
    """
    return _without(cls, attribute, container, loop, routing, *_version(cls, attribute))


def _version(cls: Any, attribute: str) -> tuple[Any, Any]:
    """What is another one when a method is patched, on the class or in place: a copy of its code is kept by that."""
    function = getattr(cls, attribute)
    return function, getattr(function, "__code__", None)


@functools.lru_cache(maxsize=256)
def _without(cls: Any, attribute: str, container: str, loop: Loop, routing: Routing, *version: Any) -> Callable[..., Any]:
    names = [*routing.names, *([loop.result] if loop.keeps or loop.adds else [])]
    function = _source(cls, attribute)
    body, node = _loops(function, container)[loop.number]
    before = _unread(function, body)
    position = body.index(node)
    body[position : position + 1] = ast.parse(f"{loop.result} = {_EXPERTS}({{{', '.join(f'{n!r}: {n}' for n in names)}}})").body
    _drop_unread(function, body, before)
    return _compiled(getattr(cls, attribute), function, _EXPERTS)


@functools.lru_cache(maxsize=256)
def _probed(cls: Any, attribute: str, container: str, number: int, *version: Any) -> Callable[..., Any]:
    """The method with a call of its keyword argument `probe` before a loop, which is given the local variables."""
    function = _source(cls, attribute)
    body, node = _loops(function, container)[number]
    body.insert(body.index(node), ast.parse(f"{_PROBE}(locals())").body[0])
    return _compiled(getattr(cls, attribute), function, _PROBE)


def _compiled(original: Any, function: ast.FunctionDef, argument: str) -> Callable[..., Any]:
    """A function of this code with one more keyword argument, among the globals of the original."""
    function.args.kwonlyargs.append(ast.arg(argument))
    function.args.kw_defaults.append(None)
    tree = ast.fix_missing_locations(ast.Module([function], []))
    ast.increment_lineno(tree, original.__code__.co_firstlineno - 1)
    code = compile(tree, original.__code__.co_filename, "exec", dont_inherit=True)
    inner = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == function.name)
    copied = types.FunctionType(inner, original.__globals__, function.name, original.__defaults__)
    copied.__kwdefaults__ = original.__kwdefaults__
    return copied


def _source(cls: type, attribute: str) -> ast.FunctionDef:
    function = getattr(cls, attribute)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise Refused(f"its {attribute} is wrapped or is no plain function")
    if function.__code__.co_freevars:
        raise Refused(f"its {attribute} refers to variables around it ({', '.join(function.__code__.co_freevars)})")
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise Refused(f"the source of its {attribute} is not available ({error})") from error
    node = ast.parse(textwrap.dedent(text)).body[0]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        raise Refused(f"its {attribute} is decorated")
    _call_it_self(node)
    node.returns = None
    for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]  # the real ones are taken from the original
    node.args.kw_defaults = [d and ast.Constant(None) for d in node.args.kw_defaults]
    return node


def _call_it_self(function: ast.FunctionDef) -> None:
    """Renames the first parameter, which nothing says has to be `self`: all that looks at the code looks for that name."""
    first = next(iter((*function.args.posonlyargs, *function.args.args)), None)
    if first is None or first.arg == "self":
        return
    own, names = first.arg, [n for n in ast.walk(function) if isinstance(n, ast.Name)]
    others = [a.arg for a in ast.walk(function) if isinstance(a, ast.arg) and a is not first]
    if own in others or "self" in others or any(n.id == "self" for n in names):
        raise Refused(f"its {function.name} uses the name {own!r} of its first parameter, or `self`, for something else")
    first.arg = "self"
    for name in names:
        if name.id == own:
            name.id = "self"


def _loops(function: ast.FunctionDef, container: str) -> list[tuple[list[ast.stmt], ast.For]]:
    """Outermost loops that mention `self.<container>`, each with the list of statements it is in."""
    found: list[tuple[list[ast.stmt], ast.For]] = []

    def visit(body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.For) and any(_is_own(node, container) for node in ast.walk(statement)):
                found.append((body, statement))
                continue
            for name in ("body", "orelse", "finalbody"):
                visit(getattr(statement, name, []))

    visit(function.body)
    return found


def _is_own(node: ast.AST, attribute: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.value, ast.Name) and node.value.id == "self"


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _names_behind(function: ast.FunctionDef, loop: ast.For) -> set[str]:
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    return {n.id for n in nodes if n.lineno > (loop.end_lineno or loop.lineno)}


def tensors_read(module: nn.Module, attribute: str, container: str, number: int) -> list[str]:
    """Tensors of the module's own that a loop mentions: what it does with them is in no formula."""
    cls: Any = type(module)
    loop = _loops(_source(cls, attribute), container)[number][1]
    names = {n.attr for n in ast.walk(loop) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"}
    return sorted(name for name in names if isinstance(getattr(module, name, None), Tensor))


def attributes_read(cls: Any, attribute: str, container: str, loop: Loop, routing: Routing) -> frozenset[str]:
    """Attributes of the module's own, and names of other variables, that a loop reads, itself or through what was made from them before it.

    What holds the routing is read anew at each call, and so is whatever it was made from.
    """
    function = _source(cls, attribute)
    node = _loops(function, container)[loop.number][1]
    made: dict[str, list[ast.AST]] = {}
    for statement in ast.walk(function):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.NamedExpr)):
            for name in {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}:
                made.setdefault(name, []).append(statement)
    found: set[str] = set()
    seen = {*routing.names, loop.result, "self"}
    waiting: list[ast.AST] = [node]
    while waiting:
        for n in ast.walk(waiting.pop()):
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self":
                found.add(n.attr)
            elif isinstance(n, ast.Name) and n.id not in seen:
                seen.add(n.id)
                found.add(n.id)
                waiting += [s for s in made.get(n.id, ()) if s is not node]
    return frozenset(found - {container})


def _unread(function: ast.FunctionDef, body: list[ast.stmt]) -> list[ast.stmt]:
    """Assignments that nothing reads."""
    loads = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    stores = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return [s for s in body if _is_unread(s, body, loads, stores)]


def _drop_unread(function: ast.FunctionDef, body: list[ast.stmt], kept: list[ast.stmt]) -> None:
    """Drops assignments beside the loop that only the loop read, and what only those read. Calls of the module's own are kept, and so
    are those that nothing read before: they are there for what else they do.
    """
    while True:
        unread = [s for s in _unread(function, body) if s not in kept]
        if not unread:
            return
        for statement in unread:
            body.remove(statement)


def _is_unread(statement: ast.stmt, body: list[ast.stmt], loads: list[str], stores: list[str]) -> bool:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or not isinstance(statement.targets[0], ast.Name):
        return False
    name = statement.targets[0].id
    if any(isinstance(n, ast.Call) and "self" in _names(n.func) for n in ast.walk(statement.value)):
        return False
    if name not in loads:
        return stores.count(name) == 1
    # Overwritten before it is read: the start value of what the loop filled.
    later = body[body.index(statement) + 1 :]
    for follower in later:
        if isinstance(follower, ast.Assign) and name in {n.id for t in follower.targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
            return name not in _names(follower.value)
        if name in _names(follower):
            return False
    return False


def as_hidden_states(out: Tensor, values: Mapping[str, Any], routing: Routing) -> Tensor:
    """Rows `[N, H]` in the shape and dtype of the hidden states."""
    x = values[routing.hidden_states]
    out = out.reshape(x.shape)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def as_result(out: Tensor, index: Tensor, values: Mapping[str, Any], loop: Loop) -> Tensor:
    """What the loop leaves in the variable that it fills, from what the experts compute, in the shape of the hidden states."""
    if loop.adds:
        return values[loop.result] + out
    if loop.apart:
        return torch.cat((out[None], out.new_zeros(loop.apart - 1, *out.shape)))
    if loop.keeps:
        return torch.where((index >= 0).any(dim=1).reshape(*out.shape[:-1], 1), out, values[loop.result])
    return out

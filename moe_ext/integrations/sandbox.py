"""Running code of a module without leaving a trace: it runs on a copy of the module, and what it can still reach is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .run import bitsandbytes
from .state import BOX, Copies, State, storage_of
from .usable import Refused

_T = TypeVar("_T")


class _Written(BaseException):
    """Code of the model was about to write into a tensor of the model. No `except Exception` of that code may swallow it."""


class _Guard(TorchDispatchMode):
    """Stops every write into a tensor of the model, before it happens, and notes those into copies."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.originals = copies.names
        self.stopped: str | None = None
        self.written: set[int] = set()
        self._outputs: dict[Any, list[tuple[int, str]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what torch does to skip it costs more than all of the below

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = self._outputs.get(func)
        if outputs is None:
            arguments = enumerate(func._schema.arguments)
            outputs = self._outputs[func] = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for i, name in outputs:
            given = args[i] if i < len(args) else kwargs.get(name)
            for t in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(t, Tensor):
                    self._look_at(t)
        return func(*args, **kwargs)

    def _look_at(self, t: Tensor) -> None:
        key = storage_of(t)
        if key in self.originals:
            self.stopped = self.originals[key]
            raise _Written
        if key is not None:
            self.written.add(key)


class Box:
    """A copy of a module to run code on: `module`, and `of` for any part of the original."""

    def __init__(self, module: nn.Module, whole: bool = False) -> None:
        self.copies = Copies(whole)
        self.module: nn.Module = self.copies.of(module)
        self.guard = _Guard(self.copies)
        self.frozen: dict[nn.Module, Frozen] = {}
        self.modules = list(self.module.modules())
        for m in self.modules:
            m.__dict__[BOX] = self

    def of(self, value: _T) -> _T:
        """What stands in the copy for `value`, a part of the original."""
        return self.copies.of(value)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Lets go of the copy, which may be large: it is no longer part of a cycle."""
        self.frozen.clear()
        for m in self.modules:
            m.__dict__.pop(BOX, None)
        self.modules.clear()


@contextlib.contextmanager
def isolated(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients are on, autocast and inference mode are off, and the random state of the CPU and of these devices is put back."""
    devices = {p.device for p in parameters if p.is_cuda}
    kind = next(iter(devices)).type if devices else "cpu"
    with (
        torch.random.fork_rng(devices=sorted(d.index for d in devices), device_type="cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(kind, enabled=False),
    ):
        yield


@contextlib.contextmanager
def sandbox(module: nn.Module) -> Iterator[Box]:
    """A copy of `module` without hooks, to run its code on. Gradients are on, autocast is off.

    What is done to the module itself all the same is put back: its attributes, and all that they hold, its buffers, its training flags;
    and so is the random state.
    """
    buffers = {id(b) for b in module.buffers()}
    state = State(module, lambda t: id(t) in buffers)
    try:
        with _copied(module) as box:
            yield box
    finally:
        state.put_back()


@contextlib.contextmanager
def _copied(module: nn.Module, whole: bool = False) -> Iterator[Box]:
    with isolated(module.parameters()):
        box = Box(module, whole)
        try:
            with bitsandbytes.weights_kept(box.module):
                yield box
        finally:
            box.close()


def run_in_sandbox(module: nn.Module, run: Callable[[Box], _T]) -> _T:
    """`run` with a copy of the module. Its large tensors are shared until the code writes into one: then it runs again on copies of all.

    Raises:
        Refused: If the code writes into tensors of the model that it does not reach through the module.
    """
    for whole in (False, True):
        with _copied(module, whole) as box, contextlib.suppress(_Written):
            result = run(box)
        if box.guard.stopped is None:
            return result
    raise Refused(f"its own code writes into {box.guard.stopped} of the model, and not through the module")


@contextlib.contextmanager
def replaced(parameters: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Other tensors stand in for parameters, given as (module, name, tensor)."""
    saved = [(module, name, module._parameters[name]) for module, name, _ in parameters]
    try:
        for module, name, value in parameters:
            module._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in saved:
            module._parameters[name] = parameter


def frozen(module: nn.Module) -> Frozen:
    """The way to run code of `module`, a copied one: the same each time."""
    box = module.__dict__[BOX]
    if module not in box.frozen:
        box.frozen[module] = Frozen(module, box.guard)
    return box.frozen[module]  # type: ignore[no-any-return]


class Frozen:
    """Detached aliases stand in for all parameters of a copied module, and clones for its buffers, so that no graph reaches them; all
    that its code writes is put back, so that the next run begins where this one did. May be entered again and again.
    """

    def __init__(self, module: nn.Module, guard: _Guard) -> None:
        modules = list(module.modules())
        self.parameters = [(m._parameters, n, p, p.detach()) for m in modules for n, p in m._parameters.items() if p is not None]
        self.buffers = [(m._buffers, n, b) for m in modules for n, b in m._buffers.items() if b is not None]
        self.modules = [m.__dict__ for m in modules]
        self.training = [attributes["training"] for attributes in self.modules]
        self.structure = [(m, type(m), m._modules.copy(), frozenset(m._buffers)) for m in modules]
        self.guard = guard
        self.state = State(module, lambda t: storage_of(t) not in guard.originals)

    def __enter__(self) -> Frozen:
        for owner, name, _, alias in self.parameters:
            owner[name] = alias  # type: ignore[assignment]
        for owner, name, buffer in self.buffers:
            owner[name] = buffer.clone()
        self.guard.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.guard.__exit__(*raised)
        # A parametrization that is put on an alias and taken off again, as PEFT does in each call, leaves it behind as a buffer; one that
        # fails leaves a class of its own.
        for m, cls, children, names in self.structure:
            for name in m._buffers.keys() - names:
                del m._buffers[name]
            if m._modules != children:
                m._modules.clear()
                m._modules.update(children)
            if type(m) is not cls:
                m.__class__ = cls
        for owner, name, tensor, *_ in (*self.parameters, *self.buffers):
            owner[name] = tensor
        flags = [attributes["training"] for attributes in self.modules]
        for attributes, training in zip(self.modules, self.training, strict=True):
            attributes["training"] = training  # told apart from what the code wrote
        self.state.put_back(lambda t: storage_of(t) in self.guard.written)
        for attributes, training in zip(self.modules, flags, strict=True):
            attributes["training"] = training

    def paused(self, compute: Callable[..., _T]) -> Callable[..., _T]:
        """`compute` without the guard, which costs more than most ops do: for code of ours that runs amid the model's."""

        def call(*args: Any) -> _T:
            self.guard.__exit__(None, None, None)
            try:
                return compute(*args)
            finally:
                self.guard.__enter__()

        return call

    def buffers_now(self) -> list[Tensor | None]:
        return [owner.get(name) for owner, name, _ in self.buffers]

    def train(self, training: bool) -> None:
        """The flags of `module.train(training)`: an override of it, as that of a layer that merges what it is made of, is not called."""
        set_training(self.modules, training)


def set_training(states: Sequence[dict[str, Any]], training: bool) -> None:
    """Sets the flag in the attributes of modules."""
    for attributes in states:
        attributes["training"] = training


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """A fixed state of the global generators, and afterwards the one before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        yield

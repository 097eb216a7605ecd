"""Running code of a module without leaving a trace: no hook is called; buffers, training flags and the random state are put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .run import bitsandbytes

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@contextlib.contextmanager
def sandbox(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no trace on `module`: no hook of it is called, and its attributes, its buffers, its training flags, its
    4-bit weights and the random state are afterwards what they were. Gradients are on, autocast is off.
    """
    attributes = [(m, m.__dict__.copy()) for m in module.modules()]
    contents = _contents(m for m, _ in attributes)
    # Emptied and filled again, not replaced: whoever holds such a dictionary, as handles and our own readers do, goes on seeing it.
    hooks = [(saved[name], dict(saved[name])) for _, saved in attributes for name in _HOOKS if saved.get(name)]
    buffers = [(m, n, b, b.clone()) for m, _ in attributes for n, b in m._buffers.items() if b is not None and not b.is_meta]
    devices = {p.device for p in module.parameters() if p.is_cuda}
    kind = next(iter(devices)).type if devices else "cpu"
    with (
        torch.random.fork_rng(devices=sorted(d.index for d in devices), device_type="cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(kind, enabled=False),
        bitsandbytes.weights_kept(module),
    ):
        try:
            for registered, _ in hooks:
                registered.clear()
            yield
        finally:
            for registered, saved in hooks:
                registered.update(saved)
            for m, saved in attributes:
                m.__dict__.clear()
                m.__dict__.update(saved)
            _put_back(contents)
            for m, n, buffer, value in buffers:
                m._buffers[n] = buffer
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)


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


def _contents(modules: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """The lists, dictionaries and sets among the attributes, each with a copy."""
    values = (v for m in modules for name, v in m.__dict__.items() if name[0] != "_")
    return [(v, copy.copy(v)) for v in values if type(v) in (list, dict, set)]


def _put_back(contents: list[tuple[Any, Any]]) -> None:
    for collection, before in contents:
        collection.clear()
        (collection.extend if isinstance(collection, list) else collection.update)(before)


class frozen:  # noqa: N801  (a context manager, named like the functions beside it)
    """Detached aliases stand in for all parameters of a module, so that no graph, hook or gradient of theirs is touched, and clones for
    its buffers; attributes that it sets, and what it puts into lists, are put back. May be entered again and again.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.parameters = [(m._parameters, n, p, p.detach()) for m in modules for n, p in m._parameters.items() if p is not None]
        self.buffers = [(m._buffers, n, b) for m in modules for n, b in m._buffers.items() if b is not None]
        self.modules = [m.__dict__ for m in modules]
        self.structure = [(m, type(m), m._modules.copy(), frozenset(m._buffers)) for m in modules]
        self.contents = _contents(modules)
        self.attributes = [(m.__dict__, {n: v for n, v in m.__dict__.items() if n[0] != "_" and n != "training"}) for m in modules]

    def __enter__(self) -> frozen:
        for owner, name, _, alias in self.parameters:
            owner[name] = alias  # type: ignore[assignment]
        for owner, name, buffer in self.buffers:
            owner[name] = buffer.clone()
        return self

    def __exit__(self, *_: object) -> None:
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
        for owner, name, parameter, _ in self.parameters:
            owner[name] = parameter
        for owner, name, buffer in self.buffers:
            owner[name] = buffer
        _put_back(self.contents)
        for attributes, saved in self.attributes:
            for name in [n for n in attributes if n[0] != "_" and n != "training" and n not in saved]:
                del attributes[name]
            attributes.update(saved)

    def buffers_now(self) -> list[Tensor | None]:
        return [owner.get(name) for owner, name, _ in self.buffers]

    def train(self, training: bool) -> None:
        """`module.train(training)`, without a look for a submodule of that name."""
        for attributes in self.modules:
            attributes["training"] = training


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """A fixed state of the global generators, and afterwards the one before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        yield

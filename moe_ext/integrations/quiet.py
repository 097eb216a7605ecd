"""Looking at a module without a trace: no hook is called; buffers, training flags and the random state are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

#: The attribute of a module that holds the callables we put in place of its methods, by name.
OUR_PATCHES = "_moe_ext_patches"

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no trace on `module`: no hook of it is called, and its attributes, its buffers, its training flags and
    the random state are afterwards what they were. Gradients are on, autocast is off.
    """
    attributes = [(m, m.__dict__.copy()) for m in module.modules()]
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


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Detached aliases stand in for all parameters of `module`, so that no graph, hook or gradient of theirs is touched."""
    with replaced([(m, n, p.detach()) for m in module.modules() for n, p in m._parameters.items() if p is not None]):
        yield


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """A fixed state of the global generators, and afterwards the one before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        yield


def replaced_method(module: nn.Module, attribute: str = "forward") -> str | None:
    """The reason not to touch a module whose method was replaced on the instance: hooks of accelerate, patches of others."""
    method = module.__dict__.get(attribute)
    if method is None or getattr(method, "__func__", None) is getattr(type(module), attribute, None):
        return None
    if attribute in module.__dict__.get(OUR_PATCHES, {}):  # ours, or a wrapper put around ours
        return None
    by = getattr(method, "__qualname__", type(method).__name__)
    return f"its {attribute} was replaced on the instance (by {by} of {getattr(method, '__module__', 'unknown origin')})"

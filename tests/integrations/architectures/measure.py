"""One model run in several ways, plain, exact and by moe_ext, on the same discrete choices and the same noise.

In low precision two experts' scores are often equal or change places, and then two runs differ by a token's whole output, which says
nothing about either. `Choices` keeps what the plain run chose and drew; every other run is made to choose and draw the same, and
computes everything else by itself. What is compared: the output and the gradients of a fixed function of it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext.testing import ErrorReport, compare
from tests.integrations.architectures import Architecture

#: Functions of numbers that give indices alone, and those that give (values, indices), with the position of their `dim`.
INDICES = {"argmax", "argmin", "argsort"}
VALUES_AND_INDICES = {"topk": 2, "sort": 1, "max": 1, "min": 1, "kthvalue": 2, "median": 1}
#: Comparisons of numbers that routers cut with.
COMPARISONS = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__"}
#: Random numbers.
NOISE = {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "multinomial"}
NOISE |= {"uniform_", "normal_", "exponential_", "bernoulli_"}

_Key = tuple[str, tuple[int, ...]]


class Choices:
    """What one run chose and drew, in order, by function and shape. `recording` fills it, `replaying` forces it on another run."""

    def __init__(self) -> None:
        self.made: defaultdict[_Key, list[Tensor]] = defaultdict(list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        with _Record(self.made):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Raises AssertionError for a choice that was not recorded, and for recorded ones that were not asked for."""
        remaining = defaultdict(list, {key: list(made) for key, made in self.made.items()})
        with _Replay(remaining):
            yield
        left = {key: len(made) for key, made in remaining.items() if made}
        assert not left, f"recorded choices that this run did not make: {left}"


def _dim(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position = VALUES_AND_INDICES[name]
    return kwargs.get("dim", args[position] if len(args) > position else (None if name in ("max", "min", "median") else -1))


def _kind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What `name` is for the modes: "noise", "indices" (or a mask), "pair"; None for everything that follows from its arguments."""
    if name in NOISE:
        return "noise"
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        return None
    if name in INDICES or name in COMPARISONS and args[0].dim() > 1:
        return "indices"
    return "pair" if name in VALUES_AND_INDICES and isinstance(_dim(name, args, kwargs), int) else None


class _Record(TorchFunctionMode):
    def __init__(self, made: defaultdict[_Key, list[Tensor]]) -> None:
        super().__init__()
        self.made = made

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        kind = _kind(name, args, kwargs)
        result = func(*args, **kwargs)
        if kind is not None:
            chosen = result[1] if kind == "pair" else result
            self.made[name, tuple(chosen.shape)].append(chosen.detach().clone())
        return result


class _Replay(TorchFunctionMode):
    def __init__(self, remaining: defaultdict[_Key, list[Tensor]]) -> None:
        super().__init__()
        self.remaining = remaining

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        kind = _kind(name, args, kwargs)
        result = func(*args, **kwargs)
        if kind is None:
            return result
        chosen = result[1] if kind == "pair" else result
        recorded = self.remaining[name, tuple(chosen.shape)]
        assert recorded, f"{name} of shape {tuple(chosen.shape)}: a choice that the recorded run did not make"
        was = recorded.pop(0)
        if kind == "noise":
            with torch.no_grad():
                return result.copy_(was)
        if kind == "indices":
            return was.clone()
        dim = _dim(name, args, kwargs)
        index = was if was.dim() == args[0].dim() else was.unsqueeze(dim)
        return type(result)((args[0].gather(dim, index).reshape(was.shape), was.clone()))


class _InDouble(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16"):
            func, args = torch.Tensor.to, (args[0], torch.float32)
        result = func(*map(_widen, args), **{name: _widen(value) for name, value in (kwargs or {}).items()})
        # A cast that copies in the model's own dtype copies here too: what is then written in place was not its input.
        return result.clone() if args and result is args[0] and self.dtype != torch.float32 and torch.float32 in args else result


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class Calls(TorchDispatchMode):
    """Counts the ops of moe_ext that are called inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace in ("moe", "moe_ext"):
            self.count[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------------------------------------- models
def build(architecture: Architecture, dtype: torch.dtype, training: bool) -> nn.Module:
    """The model with weights large enough that every nonlinearity is used, and no norm, bias or correction left at its neutral value."""
    torch.manual_seed(0)
    model = architecture.build()
    generator = torch.Generator().manual_seed(0)
    corrections = [b for name, b in model.named_buffers() if "bias" in name.rpartition(".")[2] and b.is_floating_point()]
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.2) if p.dim() > 1 else p.add_(noise * 0.1)
        for b in corrections:
            b.add_(torch.randn(b.shape, generator=generator) * 0.03)
    return _as_loaded(model, dtype).train(training)


def _as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All real numbers in `dtype`, except for what the model's class insists on keeping in float32."""
    kept = {part for m in model.modules() for part in getattr(m, "_keep_in_fp32_modules_strict", None) or ()}
    for path, module in model.named_modules():
        for name, t in (module._parameters | module._buffers).items():
            if t is not None and t.is_floating_point() and not any(f".{part}." in f".{path}.{name}." for part in kept):
                t.data = t.data.to(dtype)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy that runs the model's own code, with its plainest experts."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


@dataclass
class Run:
    """The output, and the gradients of all parameters by name (an absent gradient is zero)."""

    output: Tensor
    gradients: dict[str, Tensor]

    def equals(self, other: Run) -> bool:
        return torch.equal(self.output, other.output) and all(torch.equal(g, other.gradients[n]) for n, g in self.gradients.items())


def run(architecture: Architecture, model: nn.Module, *modes: AbstractContextManager[Any]) -> Run:
    """One forward, in `modes`, and one backward; inputs and direction are numbers that every dtype holds exactly."""
    dtype = next(model.parameters()).dtype
    inputs = {n: t.bfloat16().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in architecture.inputs().items()}
    torch.manual_seed(0)
    model.zero_grad()
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        output = architecture.output(model(**inputs))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)
    (output * direction).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return Run(output.detach(), gradients)


@contextmanager
def exactly(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Where the code of a model of `dtype` asks for float32, or for no dtype, it gets float64: a truth rounded on its way is none."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble(dtype):
            yield
    finally:
        torch.set_default_dtype(default)


# ------------------------------------------------------------------------------------------------------------------------- comparison
def quantities(names: list[str]) -> dict[str, list[str]]:
    """Parameters that are judged together. A few numbers have no typical error: parameters of experts are grouped over layers and
    experts, those of routers are one quantity, and all others, which moe_ext only passes gradients to, are one.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = set(name.split("."))
        kind = "other parameters"
        if parts & {"experts", "input_linear", "output_linear"}:
            kind = re.sub(r"\d+", "*", name)
        elif parts & {"gate", "router"}:
            kind = "routers"
        found.setdefault(kind, []).append(name)
    return found


def errors(new: Run, plain: Run, exact: Run) -> dict[str, ErrorReport]:
    """The error rule's figures of the output and of each quantity, each parameter weighted by its own size where they differ in kind."""
    figures = {"output": compare(new.output, plain.output, exact.output)}
    for kind, names in quantities(list(exact.gradients)).items():
        scales = _scales(names, plain, exact) if kind in ("routers", "other parameters") else dict.fromkeys(names, 1.0)
        together = [torch.cat([r.gradients[n].double().flatten() / scales[n] for n in names]) for r in (new, plain, exact)]
        figures[kind] = compare(*together)
    return figures


def _scales(names: list[str], plain: Run, exact: Run) -> dict[str, float]:
    """The typical size of the numbers of each gradient, so that a parameter counts by how many it has. A gradient that is nothing but
    rounding (a key's bias, which softmax ignores) is measured by the size of all.
    """
    truth = {n: exact.gradients[n] for n in names}
    everything = torch.cat([t.flatten() for t in truth.values()]).square().mean().sqrt().item()
    told = {n: (plain.gradients[n].double() - truth[n]).norm() < truth[n].norm() for n in names}
    return {n: (truth[n].square().mean().sqrt().item() if told[n] else everything) or 1.0 for n in names}

"""Where a model's own code holds its routing: which arguments of a method, or local variables before its loop, are what.

Nothing is known of their names. They are told apart by dtype and shape on a real call, every reading that fits is tried, and the
proof decides. H hidden size, E experts, K = top_k; N rows of hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """A random routing: top_k_index `[N, K]`, the experts it is drawn from, E, and the generator to go on with."""

    index: Tensor
    used: tuple[int, ...]
    experts: int
    generator: torch.Generator


@dataclass(frozen=True)
class Routing(ABC):
    """One form of a routing and the names of the values that hold it. hidden_states: `[.., H]`, N rows."""

    hidden_states: str

    @property
    def beyond(self) -> str:
        """What an id from E on means, where there are such: "returned", an expert that returns its input (a zero-computation expert),
        or "dropped", an empty slot.
        """
        return ""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of all the values it reads."""

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Of those that have gradients: the hidden states and the routing weights, if there are any."""
        return (self.hidden_states,)

    def resolve(self, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """x `[N, H]`, top_k_index `[N, K]`, top_k_weights `[N, K]`; shapes depend on those of the values alone."""
        x = values[self.hidden_states]
        x = x.reshape(-1, x.shape[-1])
        index, weights = self.read(x, values, experts)
        return x, index, x.new_ones(index.shape) if weights is None else weights.reshape(index.shape)

    @abstractmethod
    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        """top_k_index `[N, K]`, and top_k_weights of as many numbers, or None for ones."""

    def top_k(self, values: Mapping[str, Any]) -> int:
        """K of an index that `write` takes."""
        return 1

    @abstractmethod
    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        """The values that hold the routing `draw` in this form, shaped like those given; routing weights are random."""

    def spread(self, values: Mapping[str, Any], experts: int) -> dict[str, Tensor]:
        """Values that the method expects in another form than the one that has a gradient; none for most."""
        return {}


@dataclass(frozen=True)
class _Indexed(Routing):
    """A routing in a tensor of ids or of zeros and ones, with or without weights."""

    index: str
    weights: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hidden_states, self.index, *(() if self.weights is None else (self.weights,)))

    @property
    def differentiable(self) -> tuple[str, ...]:
        return (self.hidden_states, *(() if self.weights is None else (self.weights,)))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)


@dataclass(frozen=True)
class TopK(_Indexed):
    """index `[N, K]` or `[N]`, weights of the same size or None (ones)."""

    beyond: str = ""

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        return values[self.index].reshape(x.shape[0], -1), None if self.weights is None else values[self.weights]

    def top_k(self, values: Mapping[str, Any]) -> int:
        x = values[self.hidden_states]
        return values[self.index].numel() * x.shape[-1] // x.numel()

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        like = values[self.index]
        written = {self.index: draw.index.to(like.dtype).reshape(like.shape)}
        return written if self.weights is None else written | {self.weights: _random(values[self.weights], draw.generator)}


@dataclass(frozen=True)
class Dense(_Indexed):
    """index `[N, K]`, weights `[N, E]`, of which those at the index count."""

    weights: str
    beyond: str = ""

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        index = values[self.index].reshape(x.shape[0], -1)
        return index, values[self.weights].reshape(x.shape[0], -1).gather(1, index)

    def top_k(self, values: Mapping[str, Any]) -> int:
        x = values[self.hidden_states]
        return values[self.index].numel() * x.shape[-1] // x.numel()

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        """Of the scores only those of the chosen are there: the model scatters them, and only they have a gradient."""
        like, scores = values[self.index], _random(values[self.weights], draw.generator)
        return {self.index: draw.index.to(like.dtype).reshape(like.shape), self.weights: scores.gather(-1, draw.index.reshape(like.shape))}

    def spread(self, values: Mapping[str, Any], experts: int) -> dict[str, Tensor]:
        """Scores of the chosen experts `[.., K]` as the dense ones `[.., E]` that the method expects."""
        index, chosen = values[self.index], values[self.weights]
        return {self.weights: chosen.new_zeros(*index.shape[:-1], experts).scatter(-1, index, chosen)}


@dataclass(frozen=True)
class OneHot(_Indexed):
    """index `[N, E]` of zeros and ones, at most one per row, a row of zeros is dropped; weights `[N]` or None."""

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        hot = values[self.index].reshape(x.shape[0], -1)
        index = torch.where(hot.any(dim=1), hot.int().argmax(dim=1), -1)[:, None]
        return index, None if self.weights is None else values[self.weights]

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        like, hot = values[self.index], F.one_hot(draw.index[:, 0], draw.experts)
        hot[::5] = 0  # dropped
        written = {self.index: hot.to(like.dtype).reshape(like.shape)}
        return written if self.weights is None else written | {self.weights: _random(values[self.weights], draw.generator)}


@dataclass(frozen=True)
class Mask(_Indexed):
    """index `[N, E]` of zeros and ones, any number per row, weights `[N, E]`."""

    weights: str

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        expert = torch.arange(experts, device=x.device)
        return torch.where(values[self.index].reshape(x.shape[0], -1).bool(), expert, -1), values[self.weights]

    def top_k(self, values: Mapping[str, Any]) -> int:
        return 2

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        like = values[self.index]
        hot = F.one_hot(draw.index, draw.experts).amax(dim=1)
        return {self.index: hot.to(like.dtype).reshape(like.shape), self.weights: _random(values[self.weights], draw.generator)}


@dataclass(frozen=True)
class Counts(Routing):
    """index `[E]`, how many consecutive rows each expert gets; no weights."""

    index: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.hidden_states, self.index

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        expert = torch.arange(experts, device=x.device)
        return expert.repeat_interleave(values[self.index].to(x.device), output_size=x.shape[0])[:, None], None

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        counts = torch.bincount(draw.index.flatten(), minlength=draw.experts)[: draw.experts]
        return {self.index: counts.to(values[self.index].dtype)}


@dataclass(frozen=True)
class PreWeighted(Routing):
    """Every expert gets N/E consecutive rows, already multiplied by their routing weights; rows of zeros are dropped."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hidden_states,)

    def read(self, x: Tensor, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor | None]:
        expert = torch.arange(experts, device=x.device).repeat_interleave(x.shape[0] // experts, output_size=x.shape[0])
        return torch.where((x != 0).any(dim=1), expert, -1)[:, None], None

    def write(self, values: Mapping[str, Any], draw: Draw) -> dict[str, Any]:
        """Rows of the experts that are drawn from, half of them dropped."""
        x = values[self.hidden_states]
        rows = x.numel() // x.shape[-1]
        each = torch.arange(draw.experts, device=x.device).repeat_interleave(rows // draw.experts)
        some = torch.isin(each, torch.tensor(draw.used, device=x.device)) & (torch.rand(rows, generator=draw.generator) < 0.5).to(x.device)
        return {self.hidden_states: (x.reshape(rows, -1) * some[:, None]).reshape(x.shape)}


def readings(values: Mapping[str, Any], hidden: int, experts: int, identity: bool) -> Iterator[Routing]:
    """Every way to read `values` as a routing of rows `[.., hidden]` to `experts`, the likely ones first."""
    tensors = {name: t for name, t in values.items() if isinstance(t, Tensor)}
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    whole = {name: t for name, t in tensors.items() if not t.is_floating_point() and not t.is_complex()}
    for x, t in floats.items():
        if t.dim() < 2 or t.shape[-1] != hidden:
            continue
        rows = t.numel() // hidden
        others = {name: f for name, f in floats.items() if name != x}
        for index, ids in whole.items():
            some = identity or (ids.numel() > 0 and int(ids.max()) >= experts)
            for beyond in ("returned", "dropped") if some else ("",):
                yield from _of_index(x, rows, index, ids, others, experts, beyond)
        if not whole and not others and rows % experts == 0:
            yield PreWeighted(x)


def _of_index(x: str, rows: int, index: str, ids: Tensor, floats: Mapping[str, Tensor], experts: int, beyond: str) -> Iterator[Routing]:
    size = ids.numel()
    if rows and size and size % rows == 0 and ids.dtype != torch.bool:
        fitting = [name for name, w in floats.items() if w.numel() == size and w.shape[-1] == ids.shape[-1]]
        if int(ids.min()) >= 0:
            yield from (TopK(x, index, name, beyond) for name in fitting)
            dense = [name for name, w in floats.items() if w.numel() == rows * experts and w.shape[-1] == experts]
            yield from (Dense(x, index, name, beyond) for name in dense if int(ids.max()) < experts)
            if size == rows:
                yield TopK(x, index, None, beyond)
    if size == rows * experts and ids.shape[-1] == experts and bool((ids.reshape(rows, -1).int().sum(1) <= 1).all()):
        yield from (OneHot(x, index, name) for name, w in floats.items() if w.numel() == rows)
        yield OneHot(x, index, None)
    if size == rows * experts and ids.shape[-1] == experts and bool(((ids == 0) | (ids == 1)).all()):
        yield from (Mask(x, index, name) for name, w in floats.items() if w.numel() == size and w.shape[-1] == experts)
    if ids.shape == (experts,) and ids.dtype != torch.bool and int(ids.sum()) == rows:
        yield Counts(x, index)

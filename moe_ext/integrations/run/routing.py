"""Where a model's own code holds its routing: which arguments of a method, or local variables before its loop, are what.

Nothing is known of their names. They are told apart by dtype and shape on a real call, every reading that fits is tried, and the
proof decides. H hidden size, E experts, K = top_k; N rows of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Names of the values, and the form that the routing has in them.

    top_k: index `[N, K]` or `[N]`, weights of the same size or None (ones).
    dense: index `[N, K]`, weights `[N, E]`, of which those at the index count.
    one_hot: index `[N, E]` of zeros and ones, at most one per row, a row of zeros is dropped; weights `[N]` or None.
    mask: index `[N, E]` of zeros and ones, any number per row, weights `[N, E]`.
    counts: index `[E]`, how many consecutive rows each expert gets; no weights.
    pre_weighted: every expert gets N/E consecutive rows, already multiplied by their routing weights; rows of zeros are dropped.
    beyond: what an id from E on means, where there are such: "returned", an expert that returns its input (a zero-computation expert),
    or "dropped", an empty slot.
    """

    form: str
    hidden_states: str
    index: str | None = None
    weights: str | None = None
    beyond: str = ""

    def resolve(self, values: Mapping[str, Any], experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """x `[N, H]`, top_k_index `[N, K]`, top_k_weights `[N, K]`; shapes depend on those of the values alone."""
        x = values[self.hidden_states]
        x = x.reshape(-1, x.shape[-1])
        rows = x.shape[0]
        index = None if self.index is None else values[self.index]
        w = None if self.weights is None else values[self.weights]
        if self.form == "top_k":
            assert index is not None
            index = index.reshape(rows, -1)
        elif self.form == "dense":
            assert index is not None and w is not None
            index = index.reshape(rows, -1)
            w = w.reshape(rows, -1).gather(1, index)
        elif self.form == "one_hot":
            assert index is not None
            index = index.reshape(rows, -1)
            index = torch.where(index.any(dim=1), index.int().argmax(dim=1), -1)[:, None]
        else:
            expert = torch.arange(experts, device=x.device)
            if self.form == "mask":
                assert index is not None
                index = torch.where(index.reshape(rows, -1).bool(), expert, -1)
            elif self.form == "counts":
                assert index is not None
                index = expert.repeat_interleave(index.to(x.device), output_size=rows)[:, None]
            else:
                index = torch.where((x != 0).any(dim=1), expert.repeat_interleave(rows // experts, output_size=rows), -1)[:, None]
        if w is None:
            return x, index, x.new_ones(index.shape)
        return x, index, w.reshape(index.shape)


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
            yield Routing("pre_weighted", x)


def _of_index(x: str, rows: int, index: str, ids: Tensor, floats: Mapping[str, Tensor], experts: int, beyond: str) -> Iterator[Routing]:
    size = ids.numel()
    if rows and size and size % rows == 0 and ids.dtype != torch.bool:
        fitting = [name for name, w in floats.items() if w.numel() == size and w.shape[-1] == ids.shape[-1]]
        if int(ids.min()) >= 0:
            yield from (Routing("top_k", x, index, name, beyond) for name in fitting)
            dense = [name for name, w in floats.items() if w.numel() == rows * experts and w.shape[-1] == experts]
            yield from (Routing("dense", x, index, name, beyond) for name in dense if int(ids.max()) < experts)
            if size == rows:
                yield Routing("top_k", x, index, None, beyond)
    if size == rows * experts and ids.shape[-1] == experts and bool((ids.reshape(rows, -1).int().sum(1) <= 1).all()):
        yield from (Routing("one_hot", x, index, name) for name, w in floats.items() if w.numel() == rows)
        yield Routing("one_hot", x, index)
    if size == rows * experts and ids.shape[-1] == experts and bool(((ids == 0) | (ids == 1)).all()):
        yield from (Routing("mask", x, index, name) for name, w in floats.items() if w.numel() == size and w.shape[-1] == experts)
    if ids.shape == (experts,) and ids.dtype != torch.bool and int(ids.sum()) == rows:
        yield Routing("counts", x, index)

"""MoE blocks as authors of their own model code write them: none of them is in transformers, all of them are made up here.

`experts` the MLPs, `lists` and `routers` blocks with one module per expert, `stacks` with stacked parameters, `odd_loops` and `refused`
what must be left alone with a reason, `innocent` models that hold no experts at all, `remote` a model on transformers' base class.
Sizes: E experts, H hidden, I inner, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

E, H, I, K = 6, 32, 16, 2  # noqa: E741  (the project's names)


@dataclass(frozen=True)
class Case:
    """name: of the test. build: makes one block. path: how it is expected to be enabled. modes: those that the block itself can run in.
    tokens: the shape of its input before H.
    """

    name: str
    build: Callable[[], nn.Module]
    path: str = "fused"
    modes: tuple[bool, ...] = (True, False)
    tokens: tuple[int, ...] = (2, 40)


class Pair(nn.Module):
    """A model of two blocks of one kind, each called with the same hidden states; returns what they return."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build() for _ in range(2))

    def forward(self, hidden_states: Tensor) -> tuple[Any, ...]:
        return tuple(layer(hidden_states * 1.0) for layer in self.layers)  # products: a block may write into its input

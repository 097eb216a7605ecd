"""Every Mixture-of-Experts architecture of transformers as a tiny random model: `v5.ARCHITECTURES` and `v4.ARCHITECTURES`.

A new architecture is a new entry and nothing else. What is expected of it is written down with it, so that a block that is no longer
found, or takes another path, fails its test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def main_output(out: Any) -> Tensor:
    """The logits, or what the model has instead."""
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@dataclass(frozen=True)
class Architecture:
    """One configuration.

    name: the architecture, by its transformers package, with a suffix for a variant ("deepseek_v2_group").
    build: makes the model in float32 with transformers' own initialisation; the test randomises the weights afterwards.
    inputs: keyword arguments of its forward, made anew at each call.
    blocks: how many sets of routed experts its config asks for.
    path: "fused", "composed" or "skipped", for all of them.
    reason: for "skipped", words that the reason contains.
    output: picks the tensor of the model's output that is compared.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    blocks: int
    path: str = "fused"
    reason: str = ""
    output: Callable[[Any], Tensor] = main_output


def ids(length: int = 12, batch: int = 2, vocabulary: int = 64) -> dict[str, Any]:
    """`input_ids` `[batch, length]`, the same at each call."""
    return {"input_ids": torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))}

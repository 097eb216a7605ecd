"""A small language model on transformers' base class, as a repository with code of its own ships it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import H
from .lists import Block
from .routers import TwoWays

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'moe-ext[hf]')")
from transformers.utils import ModelOutput  # noqa: E402


@dataclass
class BlockOutput(ModelOutput):
    hidden_states: Tensor | None = None
    router_logits: Tensor | None = None
    aux_loss: Tensor | None = None


class WithOutput(Block):
    """Returns transformers' kind of output."""

    def forward(self, hidden_states: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights, logits = self.route(x)
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            rows, slots = torch.where(index == i)
            out.index_add_(0, rows, self.experts[i](x[rows]) * weights[rows, slots, None])
        out = out.view_as(hidden_states)
        return BlockOutput(hidden_states=out, router_logits=logits) if return_dict else (out, logits)


class RemoteConfig(transformers.PretrainedConfig):
    model_type = "own_blocks_remote"


class RemoteModel(transformers.PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, H)
        self.first, self.second = TwoWays(), WithOutput()
        self.head = nn.Linear(H, 64)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            nn.init.normal_(p, std=0.2)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        x = x + self.first(x)
        more = self.second(x)
        return self.head(x + more.hidden_states), more.router_logits

"""Training 32 steps in float32, enabled and not, from the same weights on the same data: the logits of the last step agree."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.testing import relative_error
from tests.helpers.models import build, tokens

pytestmark = pytest.mark.tf4

STEPS = 32
#: What docs/faq.md says of the logits after 32 float32 steps, as a relative difference in the Euclidean norm.
PROMISED_DIFFERENCE = 1e-5


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    model.train()
    for step in range(STEPS):
        ids = tokens(length=24, batch=4, seed=step)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return out.logits.detach()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_last_logits_agree(family: str, optimizer: str) -> None:
    plain = build(family)
    enabled = copy.deepcopy(plain)
    assert moe_ext.enable(enabled, strict=True).enabled_count == 2
    runs = []
    for model in (plain, enabled):
        rate = 0.05 if optimizer == "SGD" else 1e-3
        runs.append(train(model, getattr(torch.optim, optimizer)(model.parameters(), lr=rate)))
    start = build(family)(input_ids=tokens(length=24, batch=4, seed=STEPS - 1)).logits
    assert relative_error(start, runs[0]) > 1e3 * PROMISED_DIFFERENCE, "the training has moved the model"
    assert relative_error(runs[1], runs[0].double()) <= PROMISED_DIFFERENCE

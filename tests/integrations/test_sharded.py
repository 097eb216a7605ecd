"""Enabled models under torch's FSDP2, FSDP and DDP: two processes train as one process trains the model as it was (T49)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_ext
from moe_ext import functional
from moe_ext.integrations import usable
from moe_ext.testing import assert_accurate
from tests.helpers.models import build, expert_blocks, in_float64, tokens, transformers_major

pytestmark = [pytest.mark.tf4, pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")]

STEPS, BLOCKS = 3, 2


def train(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def update(model: nn.Module, start: dict[str, torch.Tensor]) -> torch.Tensor:
    """What training has added to all parameters, as one quantity."""
    parts = []
    with FullyShardedDataParallel.summon_full_params(model):
        for name, p in model.named_parameters():
            whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
            parts.append((whole - start[re.sub(r"^(module|_fsdp_wrapped_module)\.", "", name)]).flatten())
    return torch.cat(parts)


def by_layer(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_expert(model: nn.Module) -> nn.Module:
    for block in expert_blocks(model):
        for part in [block] if transformers_major() >= 5 else block.experts:
            fully_shard(part)
    return by_layer(model)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


#: The wrapper, and whether experts of ours run in it. One expert as a unit of FSDP is gathered by its own hook: its own code runs.
WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "fully_shard by layer": (by_layer, True),
    "fully_shard by expert": (by_expert, transformers_major() >= 5),
    "fully_shard as a whole": (fully_shard, True),
    "FullyShardedDataParallel": (fsdp1, True),
    "DistributedDataParallel": (DistributedDataParallel, True),
}


def check(rank: int, name: str, order: str, calls: list[int], reasons: list[str]) -> None:
    wrap, runs_ours = WRAPPERS[name]
    model = build("qwen3_moe")
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    plain, truth = copy.deepcopy(model), in_float64(model)
    ids = tokens(batch=4)
    # The experts that get tokens differ between the processes, which the wrappers allow for only if all experts have gradients, as
    # with our stacks; lists, ours and the model's own, leave idle experts without one and get the same tokens on both.
    mine = ids[2 * rank : 2 * rank + 2] if runs_ours and order == "before" and transformers_major() >= 5 else ids
    losses, exact = train(plain, ids), train(truth, ids)
    if order == "before":
        moe_ext.enable(model, strict=True)
        model = wrap(model)
    else:
        model = wrap(model)
        try:
            blocks = moe_ext.enable(model).blocks
        except moe_ext.NoExpertsFound as error:
            blocks = error.rejected
        assert len(blocks) == BLOCKS and all(re.search("DTensor|hooks", block.reason or "") for block in blocks), blocks
        runs_ours = False
    calls.clear()
    found = torch.stack(train(model, mine))
    dist.all_reduce(found)
    assert len(calls) == (STEPS * BLOCKS if runs_ours else 0), (name, order, len(calls))
    assert runs_ours or order == "after" or any("hooks" in reason for reason in reasons), reasons
    doubled = {key: p.double() for key, p in start.items()}
    assert_accurate(update(model, start), update(plain, start), update(truth, doubled), f"{name}, {order}")
    assert_accurate(found / 2, torch.stack(losses), torch.stack(exact), f"losses, {name}, {order}")


def process(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    calls: list[int] = []
    reasons: list[str] = []
    original = functional.grouped_experts

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    functional.grouped_experts = counted  # type: ignore[assignment]
    usable._log_once = reasons.append  # type: ignore[assignment]
    for name, order in cases:
        check(rank, name, order, calls, reasons)
    dist.destroy_process_group()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("order", ["before", "after"])
def test_T49_trains_as_the_model_in_one_process(order: str, tmp_path: Path) -> None:
    """Enabled before it is wrapped, it runs ours on the weights that the wrapper has gathered; after, it is left alone with a reason."""
    cases = [(name, order) for name in WRAPPERS if order == "before" or name.startswith("fully_shard")]
    mp.spawn(process, (str(tmp_path), cases), nprocs=2)

"""`enable` runs code of the model, on a copy: blocks that write into themselves wherever they can are what they were afterwards."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ext
from moe_ext.integrations import sandbox
from moe_ext.integrations.state import SMALL, State
from moe_ext.integrations.usable import Refused
from tests.helpers.models import CAUSAL_LM, build, build_experts, is_another, needs_tf5
from tests.integrations.own_blocks import E, H, I, Pair, lists, routers, stacks

pytestmark = pytest.mark.tf4


class Notes:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.rows, self.seen = 0, deque(maxlen=3)


class Keeps(nn.Module):
    """A router that writes into everything that a module can hold."""

    shared_by_all = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H) * 0.2)
        self.load = nn.Parameter(torch.zeros(E), requires_grad=False)
        self.register_buffer("ema", torch.zeros(E))
        self.rows, self.history, self.last = torch.zeros(1), [], deque(maxlen=2)
        self.counts: Counter[int] = Counter()
        self.notes, self._private, self.nested = Notes(), {"calls": 0}, {"a": [torch.zeros(1)]}
        self.part = nn.Identity()
        self.part.calls = 0
        self.generator, self.random = torch.Generator().manual_seed(0), random.Random(0)
        self.flag = torch.zeros(1)
        notes = self.notes
        self.note = lambda n: setattr(notes, "rows", notes.rows + n)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.linear(x, self.weight).softmax(-1).topk(2)
        chosen = torch.bincount(index.flatten(), minlength=E).to(self.load.dtype)
        self.load.data += chosen
        self.ema.mul_(0.9).add_(chosen)
        self.rows += x.shape[0]
        self.history.append(x.shape[0])
        self.last.append(index.detach())
        self.counts.update(index.flatten().tolist())
        self.notes.seen.append(x.shape[0])
        self.note(x.shape[0])
        self._private["calls"] += 1
        self.nested["a"][0] += 1
        self.part.calls += 1
        type(self).shared_by_all += 1
        torch.rand(1, generator=self.generator), self.random.random()
        self.flag.data.add_(1)
        return weights, index


class MergesInEval(nn.Linear):
    """A router whose weight holds its update in evaluation."""

    def train(self, mode: bool = True) -> MergesInEval:
        if mode != self.training:
            with torch.no_grad():
                self.weight += 1.0 if not mode else -1.0
        return super().train(mode)


class WritesByAGlobal(nn.Linear):
    """A router that knows its model by other ways than its attributes."""

    def __init__(self) -> None:
        super().__init__(H, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for model in MODELS:
            model.notes.append(len(x))
            model.calls += 1
        return super().forward(x)


#: The models that `WritesByAGlobal` knows.
MODELS: list[nn.Module] = []


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(H, I, False), nn.Linear(H, I, False), nn.Linear(I, H, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(MLP() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, index = self.route(rows)
        out = torch.zeros_like(rows)
        for e in range(E):
            row, slot = torch.where(index == e)
            out.index_add_(0, row, self.experts[e](rows[row]) * weights[row, slot, None])
        return out.reshape(x.shape)

    def route(self, rows: Tensor) -> Any:
        out = self.router(rows)
        return out if isinstance(out, tuple) else out.softmax(-1).topk(2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Parameter(torch.randn(E, 2 * I, H) * 0.2), nn.Parameter(torch.randn(E, H, I) * 0.2)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            row, slot = torch.where(index == e)
            gate, up = F.linear(x[row], self.w13[e]).chunk(2, -1)
            out.index_add_(0, row, F.linear(F.silu(gate) * up, self.w2[e]) * weights[row, slot, None])
        return out


class StackBlock(ListBlock):
    def __init__(self, router: nn.Module) -> None:
        nn.Module.__init__(self)
        self.router, self.experts = router, Stack()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, index = self.route(rows)
        return self.experts(rows, index, weights).reshape(x.shape)


def fingerprint(value: Any, path: str = "", seen: dict[int, str] | None = None) -> dict[str, Any]:
    """Everything below `value` by its path: numbers, identities and contents of tensors, collections, objects."""
    seen = {} if seen is None else seen
    if isinstance(value, (int, float, str, bool, type(None))):
        return {path: value}
    if id(value) in seen:
        return {path: seen[id(value)]}
    seen[id(value)] = path
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return {
            path: (id(value), value.data_ptr(), value._version, value.requires_grad, id(grad), value.detach().double().numpy().tobytes())
        }
    found: dict[str, Any] = {path: (type(value).__name__, id(value))}
    if isinstance(value, torch.Generator):
        return {path: bytes(value.get_state().tolist())}
    if isinstance(value, random.Random):
        return {path: value.getstate()}
    if isinstance(value, dict):
        parts: Any = value.items()
    elif isinstance(value, (list, tuple, deque)):
        parts = enumerate(value)
    elif isinstance(value, set):
        return {path: set(value)}
    else:
        parts = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    for name, part in parts:
        found |= fingerprint(part, f"{path}.{name}", seen)
    return found


def enable_and_compare(model: nn.Module, **options: Any) -> moe_ext.EnableReport | None:
    """Enables and disables; everything must be what it was."""
    before, rng, python = fingerprint(model), torch.get_rng_state(), random.getstate()
    try:
        report = moe_ext.enable(model, **options)
    except moe_ext.NoExpertsFound:
        report = None
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python
    moe_ext.disable(model)
    after = fingerprint(model)
    assert {n for n in {**before, **after} if before.get(n, "absent") != after.get(n, "absent")} == set()
    return report


ROUTERS = {"keeps": Keeps, "merges": lambda: MergesInEval(H, E, bias=False)}
BLOCKS = {"list": ListBlock, "stack": StackBlock}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_T110_a_router_that_writes_into_all_it_holds(block: str, router: str, training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[block](ROUTERS[router]())).train(training)
    counted = Keeps.shared_by_all
    report = enable_and_compare(model)
    assert report is not None and report.enabled_count == 1, str(report)
    assert Keeps.shared_by_all == counted


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_T110_experts_that_write_into_their_own_weights(large: bool) -> None:
    """Large weights are shared with the proof's copy until something writes into them; then they are copied."""

    class Writes(Stack):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self.w13.data *= 0.5
            return super().forward(x, index, weights)

    model = nn.Sequential(StackBlock(nn.Linear(H, E, bias=False)))
    model[0].experts = Writes()
    if large:
        model[0].experts.w13 = nn.Parameter(torch.randn(2 + SMALL // (4 * 2 * I * H), 2 * I, H))
        model[0].experts.w2 = nn.Parameter(torch.randn(len(model[0].experts.w13), H, I))
        model[0].router = nn.Linear(H, len(model[0].experts.w13), bias=False)
    enable_and_compare(model)


@needs_tf5
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_T110_decorated_experts_that_write(family: str) -> None:
    experts = build_experts(family)
    cls = type(experts)

    class Writes(cls):  # type: ignore[valid-type, misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            self.down_proj.data *= 1.5
            self.calls.append(len(gate_up))
            self.seen += 1
            return super()._apply_gate(gate_up)

    experts.__class__ = Writes
    experts.calls, experts.seen = [], torch.zeros(1)
    enable_and_compare(nn.Sequential(experts))


@pytest.mark.parametrize("family", CAUSAL_LM)
def test_T110_every_model_is_what_it_was(family: str) -> None:
    enable_and_compare(build(family))


@pytest.mark.parametrize("case", [*lists.CASES[:4], *routers.CASES[:6], *stacks.CASES[:4]], ids=lambda c: c.name)
def test_T110_every_block_is_what_it_was(case: Any) -> None:
    enable_and_compare(Pair(case.build))


def test_T111_merged_and_disabled_adapters_stay_in_the_weights() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(ListBlock(nn.Linear(H, E, bias=False))).double()
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).double().eval()
    x = torch.randn(1, 9, H, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    enable_and_compare(model)
    moe_ext.enable(model)
    assert not is_another(model(x), base)


def test_T112_what_a_proof_reaches_behind_the_module_is_put_back_with_its_name() -> None:
    """The router writes into the model by a global variable, which no copy of the block can replace."""
    model = nn.Sequential(ListBlock(WritesByAGlobal()))
    model.notes, model.calls = [], 0
    MODELS.append(model)
    try:
        before = fingerprint(model)
        with pytest.raises(RuntimeError, match="a proof changed .*notes"):
            moe_ext.enable(model)
        assert fingerprint(model) == before
    finally:
        MODELS.clear()


def test_T112_a_write_into_the_model_from_outside_of_the_copy_is_stopped() -> None:
    module, kept = nn.Linear(2, 2), []
    before = module.weight.detach().clone()

    def run(box: sandbox.Box) -> None:
        with sandbox.frozen(box.module):
            kept.append(0)
            module.weight.data.add_(1)

    with pytest.raises(Refused, match="weight"):
        sandbox.run_in_sandbox(module, run)
    assert torch.equal(module.weight, before) and len(kept) == 2


def test_T112_state_is_put_back_by_name() -> None:
    model = nn.Sequential(ListBlock(Keeps()))
    before, state = fingerprint(copy.deepcopy(model)), State(model, lambda t: True)
    model(torch.randn(2, 8, H))
    changed = state.put_back()
    assert {"0.router.history", "0.router.rows", "0.router._private.calls", "0.router.notes.rows"} <= set(changed)
    assert len(before) == len(fingerprint(model)) and not model[0].router.history
    assert all(not t.any() for t in (model[0].router.rows, model[0].router.load, model[0].router.ema))

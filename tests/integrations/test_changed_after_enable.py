"""What a formula was read from, changed after `enable`: the model's own code runs, with a logged reason, until it is changed back.

The experts here are written as model code writes them: in a list, in stacked parameters, behind transformers' decorator.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_ext
from moe_ext import functional
from moe_ext.integrations import usable
from moe_ext.testing import assert_accurate
from tests.helpers.models import assert_as, build_experts, is_another, needs_tf5, routing

pytestmark = pytest.mark.tf4

SCALE = 1.0
EXPERTS, HIDDEN, INNER = 6, 32, 24


class Settings:
    def __init__(self) -> None:
        self.factor = 1.0


class Act(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * self.slope


class MLP(nn.Module):
    offset = 0.0

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.act_fn, self.dropout, self.scale, self.settings = Act(), nn.Dropout(0.0), 1.0, settings

    def combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.act_fn(gate) * up) * self.settings.factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.combine(self.gate_proj(x), self.up_proj(x))) * self.scale * SCALE + self.offset


class Listed(nn.Module):
    """Routes and loops over its experts, as blocks of transformers 4 do; `scaling` is read by the loop."""

    def __init__(self) -> None:
        super().__init__()
        settings = Settings()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP(settings) for _ in range(EXPERTS))
        self.scaling = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.view(-1, x.shape[-1])
        w, chosen = torch.topk(F.softmax(self.gate(h), dim=-1), 2, dim=-1)
        out = torch.zeros_like(h)
        factor = self.scaling
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, row = torch.where(mask[e].squeeze(0))
            out.index_add_(0, row, self.experts[e](h[row]) * w[row, slot, None] * factor)
        return out.reshape(x.shape)


class Stack(nn.Module):
    """Stacked parameters without a decorator; the routing is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * 0.2)
        self.act_fn, self.scale, self.settings = Act(), 1.0, Settings()

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            row, slot = torch.where(top_k_index == e)
            gate, up = F.linear(x[row], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up * self.settings.factor, self.down_proj[e]) * self.scale * SCALE
            out.index_add_(0, row, y * top_k_weights[row, slot, None])
        return out


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.view(-1, x.shape[-1])
        w, chosen = torch.topk(F.softmax(self.gate(h), dim=-1), 2, dim=-1)
        return self.experts(h, chosen, w).reshape(x.shape)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential({"listed": Listed, "stacked": Stacked}[kind]()).eval()


X = torch.randn(1, 11, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[int]]:
    """One item for each set of experts that our code computes."""
    calls: list[int] = []
    original = functional.grouped_experts

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "grouped_experts", counted)
    usable._log_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="moe_ext")
    yield calls


def first(model: Any) -> Any:
    """An expert, or the module that holds the stacks."""
    experts = model[0].experts
    return experts[2] if isinstance(experts, nn.ModuleList) else experts


Change = Callable[[Any, pytest.MonkeyPatch], Any]


def attribute(path: str, value: Any) -> Change:
    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        owner, _, name = path.rpartition(".")
        one = first(model)
        for part in filter(None, owner.split(".")):
            one = getattr(one, part)
        patch.setattr(one, name, value)

    return change


def on_class(cls: type, name: str, make: Callable[[Any], Any]) -> Change:
    return lambda model, patch: patch.setattr(cls, name, make(getattr(cls, name)))


def twice(old: Any) -> Any:
    return lambda self, *args: 2 * old(self, *args)


def new_code(model: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * self.slope * 3

    patch.setattr(Act.forward, "__code__", forward.__code__)


def hook(model: Any, patch: pytest.MonkeyPatch) -> Any:
    return first(model).act_fn.register_forward_hook(lambda module, args, out: 2 * out).remove


def pre_hook(model: Any, patch: pytest.MonkeyPatch) -> Any:
    return first(model).act_fn.register_forward_pre_hook(lambda module, args: (2 * args[0],)).remove


def hook_by_hand(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(first(model).act_fn._forward_hooks, -1, lambda module, args, out: 2 * out)


def bound(path: str) -> Change:
    def change(model: Any, patch: pytest.MonkeyPatch) -> None:
        owner = first(model).get_submodule(path)
        patch.setitem(owner.__dict__, "forward", types.MethodType(lambda self, x: 2 * type(self).forward(self, x), owner))

    return change


#: In every form of experts.
CHANGES: dict[str, Change] = {
    "T120_hook": hook,
    "T120_pre_hook": pre_hook,
    "T120_hook_by_hand": hook_by_hand,
    "T121_number": attribute("scale", 0.5),
    "T121_number_of_the_activation": attribute("act_fn.slope", 0.5),
    "T121_number_in_an_object": attribute("settings.factor", 0.5),
    "T121_global": lambda model, patch: patch.setitem(globals(), "SCALE", 0.5),
    "T122_forward_of_the_activation": bound("act_fn"),
    "T122_another_activation": lambda model, patch: patch.setitem(first(model)._modules, "act_fn", nn.ReLU()),
    "T123_class_of_the_activation": on_class(Act, "forward", twice),
    "T123_code_in_place": new_code,
}
LISTED: dict[str, Change] = {
    "T121_dropout": lambda model, patch: (model.train(), patch.setattr(first(model).dropout, "p", 0.5)),
    "T121_number_of_the_class": on_class(MLP, "offset", lambda old: 0.5),
    "T121_number_that_the_loop_reads": lambda model, patch: patch.setattr(model[0], "scaling", 0.5),
    "T122_method_of_one_expert": lambda model, patch: patch.setattr(first(model), "combine", lambda gate, up: gate * up, raising=False),
    "T123_class_of_the_expert": on_class(MLP, "forward", twice),
    "T123_method_of_the_expert": on_class(MLP, "combine", twice),
    "T123_class_of_the_projections": on_class(nn.Linear, "forward", twice),
    "T123_class_of_the_block": on_class(Listed, "forward", twice),
}
CASES = (
    [("listed", name) for name in CHANGES | LISTED] + [("stacked", name) for name in CHANGES] + [("stacked", "T123_class_of_the_experts")]
)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: value)
def test_T120_T121_T122_T123_the_own_code_runs_until_it_is_changed_back(
    kind: str, name: str, ours: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(kind)
    moe_ext.enable(model, strict=True)
    before = model(X)
    ours.clear()
    change = {**CHANGES, **LISTED, "T123_class_of_the_experts": on_class(Stack, "forward", twice)}[name]
    with monkeypatch.context() as patch:
        undo = change(model, patch)
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(model(X))
        assert not ours and "runs its own forward: " in caplog.text
        plain = copy.deepcopy(model)
        moe_ext.disable(plain)
        torch.manual_seed(5)
        assert torch.equal(results[0], plain(X)) and torch.equal(*results) and is_another(results[0], before)
        if callable(undo):
            undo()
    model.eval()
    assert torch.equal(model(X), before) and len(ours) == 1


#: Decorated experts: what changes, the attribute of gpt-oss's experts or the class.
DECORATED: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "T121_limit": lambda experts, patch: patch.setattr(experts, "limit", 0.25),
    "T121_alpha": lambda experts, patch: patch.setattr(experts, "alpha", 0.5),
    "T122_apply_gate": lambda experts, patch: patch.setitem(experts.__dict__, "_apply_gate", lambda x: x[..., ::2] * x[..., 1::2]),
    "T123_apply_gate_of_the_class": lambda experts, patch: patch.setattr(
        type(experts), "_apply_gate", lambda self, x: x[..., ::2] * x[..., 1::2]
    ),
}


@needs_tf5
@pytest.mark.parametrize("name", DECORATED)
def test_T121_T122_T123_decorated_experts(name: str, ours: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = build_experts("gpt_oss", implementation="grouped_mm")
    holder = nn.Sequential(experts)
    plain = copy.deepcopy(experts)
    moe_ext.enable(holder, strict=True)
    index, w = routing(9, 5)
    x = torch.randn(9, 32)
    before = experts(x, index, w)
    ours.clear()
    with monkeypatch.context() as patch:
        DECORATED[name](experts, patch)
        DECORATED[name](plain, patch)
        changed = experts(x, index, w)
        assert not ours and torch.equal(changed, plain(x, index, w)) and is_another(changed, before)
    assert torch.equal(experts(x, index, w), before) and len(ours) == 1


@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_T121_a_new_proof_follows_the_change(kind: str, ours: list[int]) -> None:
    """Where the change is one that no formula has, `enable` says so; where it has one, ours runs again."""
    model = model_of(kind)
    moe_ext.enable(model, strict=True)
    for one in model[0].experts if kind == "listed" else [model[0].experts]:
        one.act_fn = nn.GELU()
    ours.clear()
    plain = copy.deepcopy(model)
    moe_ext.disable(plain)
    model(X)
    assert not ours
    moe_ext.enable(model, strict=True)
    ours.clear()
    assert_as(model(X), plain, X)
    assert len(ours) == 1


@pytest.mark.parametrize("kind", ["listed", "stacked"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_T121_a_copy_remembers_what_was_proven(kind: str, way: str, ours: list[int]) -> None:
    model = model_of(kind)
    moe_ext.enable(model, strict=True)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    ours.clear()
    assert torch.equal(twin(X), model(X)) and len(ours) == 2
    first(twin).scale = 0.5
    twin(X)
    assert len(ours) == 2


def test_T124_a_patched_class_runs_its_new_code(monkeypatch: pytest.MonkeyPatch, ours: list[int]) -> None:
    """A copy of a method without its loop is made from the code that the class has then, in this process and not before."""
    teacher = model_of("listed")
    moe_ext.enable(teacher, strict=True)
    seen: list[torch.Tensor] = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = x.view(-1, x.shape[-1])
        logits = self.gate(h)
        self.seen.append(logits)
        w, chosen = torch.topk(F.softmax(logits, dim=-1), 2, dim=-1)
        out = torch.zeros_like(h)
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, row = torch.where(mask[e].squeeze(0))
            out.index_add_(0, row, self.experts[e](h[row]) * w[row, slot, None])
        return out.reshape(x.shape)

    plain = copy.deepcopy(teacher)
    moe_ext.disable(plain)
    monkeypatch.setattr(Listed, "forward", forward)
    monkeypatch.setattr(Listed, "seen", seen, raising=False)
    student = model_of("listed")
    moe_ext.enable(student, strict=True)
    for model in (student, teacher):
        seen.clear()
        out = model(X)
        assert len(seen) == 1
        assert_as(out, plain, X)


# -------------------------------------------------------------------------------------------------------------------------- references
@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_T127_an_enabled_model_is_freed_without_the_collector(kind: str) -> None:
    model = model_of(kind)
    moe_ext.enable(model, strict=True)
    with torch.no_grad():
        model(X)
    gc.collect()
    gc.disable()
    try:
        refs = [weakref.ref(m) for m in model.modules()]
        del model
        assert not any(ref() is not None for ref in refs)
    finally:
        gc.enable()


def test_T127_pruned_experts_are_freed() -> None:
    model = model_of("listed")
    moe_ext.enable(model, strict=True)
    with torch.no_grad():
        model(X)
    gc.collect()
    expert, weight = weakref.ref(model[0].experts[5]), weakref.ref(model[0].experts[5].up_proj.weight)
    del model[0].experts[5]
    assert expert() is None and weight() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_T127_a_copy_outlives_the_original(kind: str, way: str, ours: list[int]) -> None:
    model = model_of(kind)
    moe_ext.enable(model, strict=True)
    before = model(X)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    del model
    gc.collect()
    ours.clear()
    assert torch.equal(twin(X), before) and len(ours) == 1


# --------------------------------------------------------------------------------------------------------------------------- compilers
@pytest.mark.parametrize("kind", ["listed", "stacked"])
@pytest.mark.parametrize("name", ["scale", "slope"])
def test_T125_a_compiled_model_is_compiled_again(kind: str, name: str) -> None:
    """The numbers that the proof depended on are guarded: a change leads to the model's own code."""
    model = model_of(kind).requires_grad_(False)
    moe_ext.enable(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = compiled(X)
    one = first(model) if name == "scale" else first(model).act_fn
    setattr(one, name, 0.5)
    plain = copy.deepcopy(model)
    moe_ext.disable(plain)
    changed = compiled(X)
    assert_as(changed, plain, X)
    assert is_another(changed, before)
    setattr(one, name, 1.0)
    setattr(first(plain) if name == "scale" else first(plain).act_fn, name, 1.0)
    assert_as(compiled(X), plain, X)


@pytest.mark.parametrize("kind", ["listed", "stacked"])
def test_T125_hooks_that_are_there_when_it_is_compiled_are_called(kind: str) -> None:
    """A hook that is registered later is seen by no compiled module, enabled or not: torch guards no hooks."""
    model = model_of(kind).requires_grad_(False)
    moe_ext.enable(model, strict=True)
    before = model(X)
    first(model).act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    plain = copy.deepcopy(model)
    moe_ext.disable(plain)
    torch._dynamo.reset()
    out = torch.compile(model, backend="eager")(X)
    torch._dynamo.reset()
    own, truth = (torch.compile(m, backend="eager")(X.to(d)) for m, d in ((plain, X.dtype), (copy.deepcopy(plain).double(), torch.float64)))
    assert_accurate(out, own, truth)
    assert kind == "listed" or is_another(out, before)  # in a loop, a compiler drops the hook from the own code too


@needs_tf5
@pytest.mark.parametrize("way", ["compile", "export", "export, strict"])
def test_T126_a_name_alone_is_fused_by_a_compiler_too(way: str) -> None:
    """Experts that were given the name "moe_ext" and are compiled before they are called: the formula is found outside of the graph."""
    moe_ext.register()
    experts = build_experts("gpt_oss", implementation="moe_ext").requires_grad_(False)
    index, w = routing(9, 5)
    x = torch.randn(9, 32)
    plain = build_experts("gpt_oss", implementation="eager")
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if way == "compile":
        out = torch.compile(experts, backend=keep, fullgraph=True)(x, index, w)
    else:
        exported = torch.export.export(experts, (x, index, w), strict="strict" in way)
        graphs.append(exported.graph_module)
        out = exported.module()(x, index, w)
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if "moe" in str(node.target)]
    assert len(names) == 1 and "grouped_forward" in names[0]
    assert_as(out, plain, x, index, w)

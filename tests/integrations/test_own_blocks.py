"""Blocks that moe_ext has never seen: found by structure, proven, computed within the error rule, and given back as they were."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import moe_ext
from moe_ext.testing import assert_accurate
from tests.integrations.architectures.measure import Choices, exactly
from tests.integrations.own_blocks import Case, H, Pair, innocent, lists, refused, routers, stacks

CASES = [*lists.CASES, *routers.CASES, *stacks.CASES]
#: Quantities with fewer numbers than this are judged together: an error of a few numbers is not typical of anything.
FEW = 800


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights large enough that every nonlinearity is used."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 0.1))
    return model.to(dtype)


def tokens(case: Case, model: nn.Module) -> Tensor:
    sizes = [m.in_features for n, m in model.named_modules() if n.endswith((".gate", ".router")) and isinstance(m, nn.Linear)]
    dtype = next(model.parameters()).dtype
    return torch.randn(*case.tokens, sizes[0] if sizes else H, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)


def run(model: nn.Module, x: Tensor, *modes: Any) -> tuple[list[Any], Any, dict[str, Tensor]]:
    """What the model returns, as leaves and structure, and the gradients of the input and of all parameters."""
    torch.manual_seed(0)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        leaves, structure = tree_flatten(model(leaf))
    floats = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    directions = [torch.randn(t.shape, generator=generator).bfloat16() for t in floats]
    sum((t * d.to(t.dtype)).sum() for t, d in zip(floats, directions, strict=True)).backward()
    named = [("hidden_states", leaf), *model.named_parameters()]
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
    return [t.detach() if isinstance(t, Tensor) else t for t in leaves], structure, gradients


def quantities(gradients: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of gradients that are judged together: of all layers and experts, and of all that are small."""
    kinds: dict[str, list[str]] = {}
    for name in gradients:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    small = [names for names in kinds.values() if sum(gradients[n].numel() for n in names) < FEW]
    yield from (names for names in kinds.values() if names not in small)
    if small:
        yield [name for names in small for name in names]


def check(new: Any, plain: Any, exact: Any, x: Tensor) -> None:
    assert new[1] == plain[1], "the structure of what is returned"
    hidden = [i for i, t in enumerate(plain[0]) if isinstance(t, Tensor) and t.shape == x.shape]
    for i, (a, b) in enumerate(zip(new[0], plain[0], strict=True)):
        assert type(a) is type(b) and (not isinstance(a, Tensor) or a.dtype == b.dtype), i
        if i not in hidden:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, f"returned value {i}"
    outputs = [torch.stack([r[0][i] for i in hidden]) for r in (new, plain, exact)]
    assert_accurate(*outputs, "hidden states")
    for names in quantities(plain[2]):
        sizes = [exact[2][n].norm().item() or 1.0 for n in names]
        together = [torch.cat([(r[2][n] / s).flatten() for n, s in zip(names, sizes, strict=True)]) for r in (new, plain, exact)]
        assert_accurate(*together, f"gradients of {names[0]} and the like")


def same(a: Any, b: Any) -> bool:
    values = zip([*a[0], *a[2].values()], [*b[0], *b[2].values()], strict=True)
    return all(torch.equal(s, t) if isinstance(s, Tensor) else s == t for s, t in values)


def _identity(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) else (id(value), len(value) if isinstance(value, (list, dict)) else None)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that an attempt might leave behind."""
    return {
        "random": torch.get_rng_state().tolist(),
        "tensors": {n: (id(t), t._version, t.requires_grad, id(t.grad)) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "attributes": {n: {k: _identity(v) for k, v in vars(m).items()} for n, m in model.named_modules()},
        "members": {n: [list(vars(m)[k]) for k in ("_modules", "_parameters", "_buffers")] for n, m in model.named_modules()},
        "hooks": {n: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_block(case: Case, dtype: torch.dtype, training: bool) -> None:
    training = training if training in case.modes else case.modes[0]
    model = randomised(Pair(case.build), dtype).train(training)
    x, choices = tokens(case, model), Choices()
    double = copy.deepcopy(model).double()
    plain = run(model, x, choices.recording())
    exact = run(double, x.double(), exactly(), choices.replaying())
    report = moe_ext.enable(model, strict=True)
    assert [b.path for b in report.blocks] == [case.path] * 2 and report.enabled_count == 2, str(report)
    check(run(model, x), plain, exact, x)
    assert moe_ext.disable(model) == 2
    assert same(run(model, x), plain), "the model is not what it was"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_trace_is_left_behind(case: Case) -> None:
    model = randomised(Pair(case.build), torch.float32)
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p)
    model.layers[1].eval()
    before = trace(model)
    moe_ext.enable(model)
    moe_ext.disable(model)
    assert trace(model) == before


def test_what_a_block_keeps_is_what_it_kept() -> None:
    """Attributes, buffers and calls to the outside, once for each forward."""
    model = randomised(Pair(routers.Remembers), torch.float32)
    other = copy.deepcopy(model)
    moe_ext.enable(model, strict=True)
    x = torch.randn(2, 40, H)
    for m in (model, other):
        m(x)
        m(x)
    for new, old in zip(model.layers, other.layers, strict=True):
        assert (new.calls, new.history) == (old.calls, old.history) == (2, [1, 2])
        assert torch.equal(new.load, old.load) and torch.equal(new.aux_loss, old.aux_loss)


def test_calls_to_the_outside_are_kept() -> None:
    model = randomised(Pair(routers.Reports), torch.float32)
    moe_ext.enable(model, strict=True)
    routers.REPORTED.clear()
    model(torch.randn(2, 40, H))
    assert routers.REPORTED == [160, 160]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_on_the_base_class_of_transformers(dtype: torch.dtype, training: bool, tmp_path: Path) -> None:
    remote = pytest.importorskip("tests.integrations.own_blocks.remote")
    model = remote.RemoteModel(remote.RemoteConfig()).to(dtype).train(training)
    ids, choices = torch.randint(0, 64, (2, 40)), Choices()
    exact_model = copy.deepcopy(model).double()
    with choices.recording():
        plain = run_on(model, ids)
    with exactly(), choices.replaying():
        exact = run_on(exact_model, ids)
    assert moe_ext.enable(model, strict=True).enabled_count == 2
    model.save_pretrained(tmp_path)
    with choices.replaying():
        new = run_on(model, ids)
    for name, value in exact.items():
        assert_accurate(new[name], plain[name], value, name)
    assert isinstance(model.second(torch.randn(2, 4, H, dtype=dtype)), remote.BlockOutput)
    assert isinstance(model.second(torch.randn(2, 4, H, dtype=dtype), return_dict=False), tuple)
    again = remote.RemoteModel.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())


def run_on(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The logits, the router's, and the gradients of all parameters as one: each counts by its size."""
    model.zero_grad()
    logits, router = model(ids)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(logits.dtype)
    (logits * direction).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"logits": logits.detach(), "router logits": router.detach(), "gradients": torch.cat(gradients)}


def test_an_expert_may_have_its_own_forward_but_not_that_of_another() -> None:
    model = randomised(Pair(lists.Block), torch.float32)
    for block in model.layers:
        block.experts[1].forward = block.experts[1].forward  # bound and put back, as wrappers do that were taken off again
    assert moe_ext.enable(model).enabled_count == 2
    moe_ext.disable(model)
    model.layers[0].experts[1].forward = model.layers[0].experts[2].forward
    report = moe_ext.enable(model)
    assert report.enabled_count == 1 and "expert 1 has hooks or a forward of its own" in (report.blocks[0].reason or "")


def test_hooks_on_experts_are_called_whenever_they_are_registered() -> None:
    model = randomised(Pair(lists.Block), torch.float32)
    calls: list[int] = []
    model.layers[0].experts[2].register_forward_hook(lambda *_: calls.append(0))
    report = moe_ext.enable(model)
    assert not report.blocks[0].enabled and "expert 2 has hooks" in report.blocks[0].reason and report.blocks[1].enabled
    model.layers[1].experts[3].up_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    assert calls == []
    model(torch.randn(2, 40, H))
    assert calls == [0, 1]


# ------------------------------------------------------------------------------------------------------------------- left untouched
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", refused.CASES, ids=lambda c: c.name)
def test_what_computes_something_else_is_refused(case: refused.Refused, dtype: torch.dtype) -> None:
    model = Pair(case.build)
    scales = {n: p.detach().clone() for n, p in model.named_parameters() if "scale" in n}
    randomised(model, dtype).load_state_dict(scales, strict=False)
    before = trace(model)
    with pytest.raises((moe_ext.EnableError, moe_ext.NoExpertsFound), match=case.reason) as caught:
        moe_ext.enable(model, strict=True)
    blocks = caught.value.rejected if isinstance(caught.value, moe_ext.NoExpertsFound) else caught.value.report.blocks
    assert blocks and all(re.search(case.reason, b.reason or "") for b in blocks)
    assert trace(model) == before
    try:
        report = moe_ext.enable(model)
        assert report.enabled_count == 0
    except moe_ext.NoExpertsFound:
        pass
    assert trace(model) == before


@pytest.mark.parametrize("build", innocent.MODELS, ids=lambda m: m.__name__)
def test_a_model_without_experts_is_left_alone(build: type[nn.Module]) -> None:
    model = build()
    before = trace(model)
    with pytest.raises(moe_ext.NoExpertsFound) as caught:
        moe_ext.enable(model)
    assert not caught.value.rejected, [(b.module, b.reason) for b in caught.value.rejected]
    assert trace(model) == before


@pytest.mark.parametrize("build", innocent.MODELS, ids=lambda m: m.__name__)
def test_beside_real_experts_nothing_else_is_in_the_report(build: type[nn.Module]) -> None:
    model = nn.ModuleDict({"moe": Pair(lists.Block), "stacked": Pair(lambda: stacks.Whole(stacks.Transposed, "index weights x"))})
    model["other"] = build()
    report = moe_ext.enable(model, strict=True)
    assert [b.module for b in report.blocks] == ["moe.layers.0", "moe.layers.1", "stacked.layers.0.experts", "stacked.layers.1.experts"]
    assert report.enabled_count == 4

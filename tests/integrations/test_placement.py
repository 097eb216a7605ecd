"""Weights and modules that are not simply there: offloaded, hooked, replaced, sharded, copied. Whatever happens to the experts of an
enabled model between two calls, the next call is right: by the model's own code where ours cannot be used, with a logged reason, and by
ours again when the cause is gone. The numbers are those of TRAPS: T27, T45, T46, T49, T56, T57, T100.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import moe_ext
from moe_ext import functional
from moe_ext.integrations import usable
from moe_ext.integrations.run import patch
from moe_ext.testing import assert_accurate
from tests.helpers.models import build, expert_blocks, in_float64, logits_and_gradients, needs_tf4, needs_tf5, tokens, transformers_major

pytestmark = pytest.mark.tf4

BLOCKS = 2


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[int]]:
    """One item for each set of experts that our code computes; reasons are logged anew in every test."""
    calls: list[int] = []
    original = functional.grouped_experts

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "grouped_experts", counted)
    usable._log_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="moe_ext")
    yield calls


def logits(model: nn.Module, calls: list[int] | None = None) -> torch.Tensor:
    if calls is not None:
        calls.clear()
    with torch.no_grad():
        return model(tokens()).logits


# --------------------------------------------------------------------------------------------------- changes between two calls (T100)
Undo = Callable[[], Any]


def expert(model: nn.Module) -> Any:
    """The expert that the changes are made to: one that has tokens."""
    return expert_blocks(model)[0].experts[2]


def hooked(kind: str, part: str) -> Callable[[nn.Module], Undo]:
    def change(model: nn.Module) -> Undo:
        module = expert(model).get_submodule(part)

        def double(module: nn.Module, *values: Any) -> Any:
            return tuple(2 * v for v in values[0]) if kind == "register_forward_pre_hook" else 2 * values[1]

        return getattr(module, kind)(double).remove

    return change


def replaced_hooks(model: nn.Module) -> Undo:
    linear = expert(model).down_proj
    linear._forward_hooks = OrderedDict()
    return linear.register_forward_hook(lambda module, args, out: 2 * out).remove


def hook_on_everything(model: nn.Module) -> Undo:
    linear = expert(model).down_proj
    return register_module_forward_hook(lambda module, args, out: 2 * out if module is linear else None).remove


def own_forward(model: nn.Module) -> Undo:
    linear = expert(model).up_proj
    linear.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight), linear)
    return lambda: delattr(linear, "forward")


def other_class(part: str) -> Callable[[nn.Module], Undo]:
    def change(model: nn.Module) -> Undo:
        module = expert(model).get_submodule(part)
        before = type(module)
        module.__class__ = type("Doubled", (before,), {"forward": lambda self, x: 2 * before.forward(self, x)})
        return lambda: setattr(module, "__class__", before)

    return change


def other_activation(model: nn.Module) -> Undo:
    one = expert(model)
    before = one.act_fn
    one.act_fn = nn.ReLU()
    return lambda: setattr(one, "act_fn", before)


def parametrized(model: nn.Module) -> Undo:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    linear = expert(model).up_proj
    nn.utils.parametrize.register_parametrization(linear, "weight", Double())
    return lambda: nn.utils.parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


#: A change, and its undoing. While it lasts, the model's own code runs.
TO_THEIRS: dict[str, Callable[[nn.Module], Undo]] = {
    "forward hook on a projection": hooked("register_forward_hook", "down_proj"),
    "forward hook on an expert": hooked("register_forward_hook", ""),
    "forward hook on an activation": hooked("register_forward_hook", "act_fn"),
    "forward pre-hook on a projection": hooked("register_forward_pre_hook", "gate_proj"),
    "forward pre-hook on an expert": hooked("register_forward_pre_hook", ""),
    "hooks in a new dictionary": replaced_hooks,
    "hook on all modules": hook_on_everything,
    "forward on an instance": own_forward,
    "class of a projection": other_class("up_proj"),
    "class of an expert": other_class(""),
    "activation": other_activation,
    "parametrization": parametrized,
}


def check_now(model: nn.Module, plain: nn.Module, calls: list[int], expected: int) -> torch.Tensor:
    """`model` is right now, by `expected` sets of experts of ours; where there are fewer, it is what its own code computes."""
    out, own = logits(model, calls), logits(plain)
    assert len(calls) == expected
    assert_accurate(out, own, logits(in_float64(plain)))
    return out


@needs_tf4
@pytest.mark.parametrize("name", TO_THEIRS)
def test_T56_T100_a_change_that_needs_the_models_own_code(name: str, ours: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen3_moe")
    plain = copy.deepcopy(model)
    moe_ext.enable(model, strict=True)
    before = check_now(model, plain, ours, BLOCKS)
    undo, undo_plain = TO_THEIRS[name](model), None if name == "hook on all modules" else TO_THEIRS[name](plain)
    for _ in range(2):
        changed = logits(model, ours)
        assert len(ours) == (0 if name == "hook on all modules" else BLOCKS - 1) and not torch.equal(changed, before)
    if undo_plain is not None:
        assert_accurate(changed, logits(plain), logits(in_float64(plain)))
        undo_plain()
    assert "runs its own forward: " in caplog.text
    undo()
    assert torch.equal(check_now(model, plain, ours, BLOCKS), before)


def tied(model: nn.Module) -> None:
    experts = expert_blocks(model)[0].experts
    experts[2].up_proj.weight = experts[1].up_proj.weight


def replace_expert(model: nn.Module) -> None:
    expert_blocks(model)[0].experts[2] = copy.deepcopy(expert_blocks(model)[0].experts[1])


def another_list(model: nn.Module) -> None:
    block = expert_blocks(model)[0]
    block.experts = nn.ModuleList(reversed(block.experts))


def other_parameters(model: nn.Module) -> None:
    linear = expert(model).up_proj
    linear._parameters = {"weight": nn.Parameter(2 * linear.weight.detach()), "bias": None}


def another_bias(model: nn.Module) -> None:
    for one in expert_blocks(model)[0].experts:
        one.down_proj.bias = nn.Parameter(torch.linspace(-1, 1, 32))


def data_of_parameters(model: nn.Module) -> None:
    expert(model).up_proj.weight.data = 2 * expert(model).up_proj.weight.data


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        expert(model).up_proj.weight.mul_(2)


def loaded(assign: bool) -> Callable[[nn.Module], Any]:
    def load(model: nn.Module) -> None:
        model.load_state_dict({name: 1.25 * t for name, t in model.state_dict().items()}, assign=assign)

    return load


#: What ours follows.
FOLLOWED: dict[str, Callable[[nn.Module], Any]] = {
    "tied experts": tied,
    "another expert": replace_expert,
    "another list of experts": another_list,
    "one expert more": lambda model: expert_blocks(model)[0].experts.append(copy.deepcopy(expert(model))),
    "other parameters": other_parameters,
    "another parameter": lambda model: setattr(expert(model).up_proj, "weight", nn.Parameter(2 * expert(model).up_proj.weight.detach())),
    "biases": another_bias,
    "data of a parameter": data_of_parameters,
    "edit in place": in_place,
    "load_state_dict": loaded(False),
    "load_state_dict(assign=True)": loaded(True),
    "half": lambda model: model.half(),
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
}


@needs_tf4
@pytest.mark.parametrize("name", FOLLOWED)
def test_T57_T100_a_change_that_is_followed(name: str, ours: list[int]) -> None:
    """No stack and no copy of the weights is kept that could be out of date."""
    model = build("qwen3_moe")
    plain = copy.deepcopy(model)
    moe_ext.enable(model, strict=True)
    before = check_now(model, plain, ours, BLOCKS)
    for one in (model, plain):
        FOLLOWED[name](one)
    changed = check_now(model, plain, ours, BLOCKS)
    if name != "one expert more":
        assert not torch.equal(before, changed)


def stacked_parametrized(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(expert_blocks(model)[0], "down_proj", Double())


def twice_as_large(model: nn.Module) -> None:
    experts = expert_blocks(model)[0]
    experts.down_proj = nn.Parameter(2 * experts.down_proj.detach())


def first_block(method: str, hook: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(expert_blocks(model)[0], method)(hook)


#: A change, and how many sets of experts are ours after it.
STACKED: dict[str, tuple[Callable[[nn.Module], Any], int]] = {
    "hook on the experts": (first_block("register_forward_hook", lambda module, args, out: 2 * out), BLOCKS),
    "pre-hook on the experts": (first_block("register_forward_pre_hook", lambda module, args: (2 * args[0], *args[1:])), BLOCKS),
    "parametrization": (stacked_parametrized, BLOCKS),
    "another parameter": (twice_as_large, BLOCKS),
    "load_state_dict(assign=True)": (loaded(True), BLOCKS),
    "to(bfloat16)": (lambda model: model.to(torch.bfloat16), BLOCKS),
    "activation": (lambda model: setattr(expert_blocks(model)[0], "act_fn", nn.ReLU()), BLOCKS - 1),
}


@needs_tf5
@pytest.mark.parametrize("name", STACKED)
def test_T56_T57_changes_of_stacked_experts(name: str, ours: list[int]) -> None:
    change, expected = STACKED[name]
    model = build("qwen3_moe")
    plain = copy.deepcopy(model)
    moe_ext.enable(model, strict=True)
    before = check_now(model, plain, ours, BLOCKS)
    for one in (model, plain):
        change(one)
    assert not torch.equal(check_now(model, plain, ours, expected), before)


@needs_tf4
def test_T56_hooks_that_were_there_before_are_called() -> None:
    """Calibration before enabling: every expert with tokens fires, also after a proof that did not call the hooks."""
    model = build("qwen3_moe")
    seen: list[Any] = []
    handles = [
        one.down_proj.register_forward_hook(lambda module, args, out: seen.append(module))
        for b in expert_blocks(model)
        for one in b.experts
    ]
    own = logits(model)
    fired, seen[:] = list(seen), []
    with contextlib.suppress(moe_ext.NoExpertsFound):  # hooks are a reason, which is the only one here
        moe_ext.enable(model)
    assert not seen
    assert torch.equal(logits(model), own) and seen == fired
    for handle in handles:
        handle.remove()
    moe_ext.enable(model, strict=True)
    assert not torch.equal(logits(model), own)


@needs_tf4
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_T56_backward_hooks_are_called(kind: str) -> None:
    model = build("qwen3_moe")
    exact = logits_and_gradients(in_float64(model), tokens())
    moe_ext.enable(model)
    logits_and_gradients(model, tokens())
    seen: list[nn.Module] = []
    handle = getattr(expert(model).down_proj, kind)(lambda module, *grads: seen.append(module))
    plain = logits_and_gradients(model, tokens())
    assert seen == [expert(model).down_proj]
    handle.remove()
    for name, value in logits_and_gradients(model, tokens()).items():
        assert_accurate(value, plain[name], exact[name], name)
    assert len(seen) == 1


def test_T27_requires_grad_switched_after_enabling(ours: list[int]) -> None:
    model = build("qwen3_moe").requires_grad_(False)
    truth, own = in_float64(model), copy.deepcopy(model)
    moe_ext.enable(model, strict=True)
    for wanted in (True, False):
        for one in (model, own, truth):
            one.requires_grad_(False)
            one.get_input_embeddings().weight.requires_grad_()
            for block in expert_blocks(one):
                block.requires_grad_(wanted)
        ours.clear()
        new, plain, exact = (logits_and_gradients(one, tokens()) for one in (model, own, truth))
        assert len(ours) == BLOCKS
        experts = [p.grad for block in expert_blocks(model) for p in block.parameters()]
        assert all((grad is not None) == wanted for grad in experts)
        for name in exact:
            assert_accurate(new[name], plain[name], exact[name], name)


# ---------------------------------------------------------------------------------------------------- meta, offloading (T45, T46, T49)
def test_T45_weights_on_meta(ours: list[int]) -> None:
    model = build("qwen3_moe")
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    moe_ext.enable(model, strict=True)
    before = logits(model)
    model.to("meta")
    refused = moe_ext.enable(build("qwen3_moe").to("meta"))
    assert {b.reason for b in refused.blocks} == {"could not be proven: its weights are on the meta device"}
    # What is not in a state_dict has to be made anew; a model that was just built has it.
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = build("qwen3_moe").model.rotary_emb
    assert torch.equal(logits(model, ours), before) and len(ours) == BLOCKS


def offloaded(model: nn.Module, tmp_path: Any, way: str) -> nn.Module:
    from accelerate import cpu_offload, dispatch_model
    from accelerate.hooks import attach_align_device_hook

    cpu = torch.device("cpu")
    if way == "cpu_offload":
        return cpu_offload(model, execution_device=cpu)
    if way.startswith("attach"):
        attach_align_device_hook(model, execution_device=cpu, offload="offload" in way)
        return model
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return dispatch_model(model, device_map={**places, "model.layers.1": "disk"}, offload_dir=tmp_path)


@pytest.mark.parametrize("way", ["cpu_offload", "attach", "attach, offload", "dispatch_model"])
def test_T45_T46_hooks_of_accelerate_after_enabling(way: str, tmp_path: Any, ours: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Experts that are modules run as such, with their hooks. A hook on stacked experts brings the weights before ours reads them."""
    from accelerate.hooks import remove_hook_from_submodules

    model = build("qwen3_moe")
    own = logits(model)
    moe_ext.enable(model, strict=True)
    before = logits(model)
    model = offloaded(model, tmp_path, way)
    for _ in range(2):
        out = logits(model, ours)
        if transformers_major() >= 5:
            assert torch.equal(out, before) and len(ours) == BLOCKS
        else:
            assert torch.equal(out, own) and not ours and "has hooks or a forward of its own" in caplog.text
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, ours), before) and len(ours) == BLOCKS
    assert moe_ext.disable(model) == BLOCKS and torch.equal(logits(model), own)


@pytest.mark.parametrize("way", ["cpu_offload", "attach", "attach, offload", "dispatch_model"])
def test_T46_hooks_of_accelerate_before_enabling(way: str, tmp_path: Any, ours: list[int]) -> None:
    """What can be enabled below them is; the rest is left alone with a reason, and is as right as before."""
    from accelerate.hooks import remove_hook_from_submodules

    model = build("qwen3_moe")
    own, truth = logits(model), logits(in_float64(model))
    model = offloaded(model, tmp_path, way)
    try:
        blocks = moe_ext.enable(model).blocks
    except moe_ext.NoExpertsFound as error:
        blocks = error.rejected
    assert len(blocks) == BLOCKS and all(block.enabled or block.reason for block in blocks)
    out = logits(model, ours)
    assert len(ours) == sum(block.enabled for block in blocks)
    assert_accurate(out, own, truth) if ours else None
    assert ours or torch.equal(out, own)
    remove_hook_from_submodules(model)
    assert moe_ext.enable(model, strict=True).enabled_count == BLOCKS
    assert_accurate(logits(model), own, truth)


@needs_tf4
def test_T49_weights_emptied_by_zero3() -> None:
    """DeepSpeed's marks on a parameter that is sharded: no data, and the attributes that say what it was. A hook brings the data back."""
    model = build("qwen3_moe")
    own = logits(model)
    moe_ext.enable(model, strict=True)
    before = logits(model)
    full = {}
    for one in expert_blocks(model)[1].experts:
        for linear in (one.gate_proj, one.up_proj, one.down_proj):
            p = linear.weight
            full[linear], p.ds_id, p.ds_shape, p.ds_status = p.data, len(full), p.shape, "NOT_AVAILABLE"
            p.data = torch.empty(0)
    reader = patch.patches_of(expert_blocks(model)[1])["forward"].replacement.reader
    with pytest.raises(usable.Refused, match="a weight is empty: it is sharded by ZeRO-3, or not loaded"):
        reader.read(expert_blocks(model)[1], torch.zeros(1))

    def gather(linear: nn.Linear, args: Any) -> None:
        linear.weight.data = full[linear]

    def release(linear: nn.Linear, args: Any, out: Any) -> None:
        linear.weight.data = torch.empty(0)

    handles = [h for linear in full for h in (linear.register_forward_pre_hook(gather), linear.register_forward_hook(release))]
    assert not torch.equal(logits(model), before)
    for handle in handles:
        handle.remove()
    for linear, data in full.items():
        linear.weight.data = data
    assert torch.equal(logits(model), before)
    moe_ext.disable(model)
    assert torch.equal(logits(model), own)


# ------------------------------------------------------------------------------------------------------------------------- replicas
def replicas(model: nn.Module, factor: float) -> nn.Module:
    """What `nn.parallel.replicate` makes for one device, whose tensors are not the model's: here they are `factor` times as large."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[child])
        for name, p in module._parameters.items():
            replica._parameters[name] = None
            if p is not None:
                del replica._parameters[name]
                setattr(replica, name, p.detach() * factor)
    return copies[model]


def test_a_replica_of_data_parallel_computes_with_its_own_weights(ours: list[int]) -> None:
    model = build("qwen3_moe")
    moe_ext.enable(model, strict=True)
    before = logits(model)
    block = expert_blocks(model)[0]
    larger = copy.deepcopy(model)
    moe_ext.disable(larger)
    with torch.no_grad():
        for p in larger.parameters():
            p.mul_(1.25)
    args = block_arguments(block)
    replica = replicas(block, 1.25)
    truth = expert_blocks(in_float64(larger))[0]
    for _ in range(2):
        new, plain = first(replica(*args)), first(expert_blocks(larger)[0](*args))
        assert_accurate(new, plain, first(truth(*(a.double() if a.is_floating_point() else a for a in args))))
    assert torch.equal(logits(model, ours), before) and len(ours) == BLOCKS
    moe_ext.disable(model)
    assert "_replicate_for_data_parallel" not in block.__dict__


def block_arguments(block: nn.Module) -> tuple[torch.Tensor, ...]:
    x = torch.randn(1, 24, 32)
    if transformers_major() < 5:
        return (x,)
    index = torch.rand(24, 8).argsort(dim=1)[:, :2]
    return x[0], index, torch.rand(24, 2)


def first(out: Any) -> torch.Tensor:
    return (out[0] if isinstance(out, tuple) else out).detach()


def test_functional_call_uses_the_tensors_it_is_given(ours: list[int]) -> None:
    model, other = build("qwen3_moe"), build("qwen3_moe")
    loaded(False)(other)
    plain, truth = logits(other), logits(in_float64(other))
    moe_ext.enable(model, strict=True)
    before = logits(model, ours)
    ours.clear()
    with torch.no_grad():
        out = torch.func.functional_call(model, dict(other.named_parameters()), (tokens(),)).logits
    assert len(ours) == BLOCKS
    assert_accurate(out, plain, truth)
    assert torch.equal(logits(model), before)


def test_a_shallow_copy_shares_everything() -> None:
    """`copy.copy` of a module shares its dictionaries of parameters and modules, in torch as with ours: also what is changed later."""
    block = expert_blocks(build("qwen3_moe"))[0]
    args = block_arguments(block)
    with torch.no_grad():
        twin = copy.copy(block)
        for p in block.parameters():
            p.mul_(1.5)
        assert torch.equal(first(twin(*args)), first(block(*args)))

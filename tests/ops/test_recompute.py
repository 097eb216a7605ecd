"""recompute: training keeps hidden_states and the routing only, and its backward forms the pre-activation again: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ext
from tests.helpers.models import build, expert_blocks, tokens
from tests.helpers.op_table import LAYERS, Case, Maker, layer, listed
from tests.ops.test_grouped_forward import Recorder, fused, fused_list, gradients, saved_by

STACKED = {"default": LAYERS["default"], "gpt_oss": LAYERS["gpt_oss"], "bias": layer(bias=True, ids="dropped")}
LISTED = {"default": listed(LAYERS["default"]), "bias": listed(layer(bias=True, ids="dropped")), "ungated": listed(LAYERS["ungated_relu2"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_the_bits_are_the_same(name: str, dtype: torch.dtype) -> None:
    args, options = STACKED[name](Maker(dtype, f"recompute-{name}"))
    expected = gradients(lambda *a: fused(*a, **options), args)
    with Recorder() as recorder:
        found = gradients(lambda *a: fused(*a, **options, recompute=True), args)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    pre_act = next(results[1] for op, _, results in recorder.calls if "_grouped_forward_train" in op)
    assert pre_act.numel() == 0


@pytest.mark.parametrize("name", LISTED)
def test_the_bits_are_the_same_for_lists(name: str) -> None:
    args, options = LISTED[name](Maker(torch.bfloat16, f"recompute-{name}"))

    def run(recompute: bool) -> list[Tensor]:
        leaves = [[t.detach().requires_grad_() for t in a] if isinstance(a, list) else a for a in args]
        leaves[0] = args[0].detach().requires_grad_()
        out = fused_list(*leaves, **options, recompute=recompute)
        flat = [leaves[0], *(t for a in leaves if isinstance(a, list) for t in a)]
        return [out, *torch.autograd.grad(out, flat, torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept(frozen: bool) -> None:
    """Bytes per token, weights aside: 2H + (4 + 4 + 4)K for x, routing weights and the two maps, in bfloat16; and 4(E+1) in all."""
    T, K, E, H, inner = 50, 2, 4, 64, 48
    args, options = layer(T=T, K=K, E=E, H=H, I=inner)(Maker(torch.bfloat16, "kept"))
    args = (args[0].detach().requires_grad_(), args[1], args[2].float(), *(a.requires_grad_(not frozen) for a in args[3:5]), *args[5:])

    def kept(recompute: bool) -> int:
        _, tensors = saved_by(lambda: fused(*args, **options, recompute=recompute))
        weights = {a.data_ptr() for a in args[3:] if isinstance(a, Tensor)}
        return sum(t.nbytes for t in tensors if t.data_ptr() not in weights)

    assert kept(True) == T * (2 * H + 12 * K) + 4 * (E + 1)
    assert kept(False) == T * ((0 if frozen else 2 * H) + 4 * K * inner + 12 * K) + 4 * (E + 1)


def test_a_bias_changed_before_the_backward_is_noticed() -> None:
    args, options = layer(bias=True)(Maker(torch.float32, "changed"))
    bias = args[5].clone()
    for recompute in (False, True):
        x = args[0].detach().requires_grad_()
        out = fused(x, *args[1:5], bias, *args[6:], **options, recompute=recompute)
        bias.add_(1)
        if recompute:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        else:
            out.sum().backward()  # it is not read again
            assert x.grad is not None and x.grad.isfinite().all()


def test_hidden_states_are_asked_for() -> None:
    args, options = Case("_grouped_backward", "recompute").inputs(torch.float32)
    with pytest.raises(RuntimeError, match="hidden_states is needed to form the pre-activation again"):
        torch.ops.moe_ext._grouped_backward(args[0], None, *args[2:], **options)


def test_compiled() -> None:
    args, options = layer(bias=True)(Maker(torch.float32, "compiled"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: fused(*a, **options, recompute=True), fullgraph=True, backend="aot_eager")
    expected = gradients(lambda *a: fused(*a, **options), args)
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, args), expected, strict=True))


@pytest.mark.tf4
def test_enable_with_recompute() -> None:
    def run(**options: Any) -> tuple[list[Tensor], int, str]:
        model = build("qwen3_moe").train()
        report = moe_ext.enable(model, **options)
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            loss = model(tokens()).logits.square().mean()
        loss.backward()
        slots = tokens().numel() * model.config.num_experts_per_tok
        wide = sum(shape == (slots, 2 * model.config.moe_intermediate_size) for shape in shapes)
        assert len(expert_blocks(model)) == len(report.blocks) == report.enabled_count
        return [p.grad for p in model.parameters() if p.grad is not None], wide, report.blocks[0].path

    expected, with_pre_act, _ = run()
    found, without, path = run(recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert path == "fused" and without == 0 and with_pre_act > 0

"""T132: what an op refuses at run time, torch.compile, torch.export and the meta device refuse too, with the same sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ext import ops as _ops  # noqa: F401  (loads the ops)
from tests.helpers.op_table import OPS, tensors
from tests.ops.fuzz import Fuzzer, overload

CALLS = 1500


def message_of(name: str, args: Any, options: dict[str, Any]) -> str:
    """What is raised, or ''."""
    try:
        overload(name)(*args, **options)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


def test_T132_the_fake_says_what_the_op_says() -> None:
    """Where several things are wrong, either may say another of them first."""
    fuzzer = Fuzzer(7)
    refused, compared, same = dict.fromkeys(OPS, 0), 0, 0
    for number in range(CALLS):
        name, args, options = fuzzer.draw()
        if name == "sort_by_expert" and args[1] > 2**31:
            continue  # no memory for it, which a fake cannot know
        with FakeTensorMode() as mode:

            def fake(value: Any, mode: FakeTensorMode = mode) -> Any:
                if isinstance(value, Tensor):
                    return mode.from_tensor(value)
                return [fake(v) for v in value] if isinstance(value, list) else value

            found = message_of(name, fake(args), options)
        expected = message_of(name, args, options)
        if any(f"{index}[" in expected for index in ("expert_offsets", "row_to_slot", "slot_to_row")):
            continue  # values are seen by the op alone
        assert bool(found) == bool(expected), (number, name, found, expected)
        refused[name] += bool(expected)
        compared += 1
        same += found == expected
    assert all(refused.values()), refused
    assert same > 0.95 * compared > 0.9 * 0.95 * CALLS


def layer(hidden: int = 16) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(3, 16), "top_k_index": torch.zeros(3, 2, dtype=torch.int64), "top_k_weights": torch.ones(3, 2),
        "gate_up_proj": torch.randn(4, 16, hidden), "down_proj": torch.randn(4, hidden, 8),
    }  # fmt: skip


WRONG = {
    "hidden_size": (layer(12), "its experts take 12 inputs but hidden_states has H=16"),
    "ids_int16": (layer() | {"top_k_index": torch.zeros(3, 2, dtype=torch.int16)}, "top_k_index is int16, expected int32 or int64"),
    "tokens": (layer() | {"top_k_weights": torch.ones(4, 2)}, r"top_k_weights has shape \[4, 2\], expected \[3, 2\]"),
    "dtype": (layer() | {"down_proj": torch.randn(4, 16, 8).bfloat16()}, "down_proj is bfloat16 but hidden_states is float32"),
}


class Layer(torch.nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return torch.ops.moe.grouped_forward(*args)


@pytest.mark.parametrize("wrong", WRONG)
def test_T132_export_refuses(wrong: str) -> None:
    args, message = WRONG[wrong]
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.export.export(Layer(), tuple(args.values()))


@pytest.mark.parametrize("wrong", WRONG)
def test_T132_compile_refuses(wrong: str) -> None:
    args, message = WRONG[wrong]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(Layer(), fullgraph=True, backend="eager")(*args.values())


@pytest.mark.parametrize("wrong", WRONG)
def test_T132_the_meta_device_refuses(wrong: str) -> None:
    args, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=message):
        Layer()(*(t.to("meta") for t in args.values()))


def test_T132_sizes_stay_dynamic() -> None:
    args = layer()
    dims = {0: torch.export.Dim("T", min=1, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(Layer(), tuple(args.values()), dynamic_shapes={"args": (dims, dims, dims, None, None)})
    longer = [t.repeat(5, 1) for t in list(args.values())[:3]]
    weights = list(args.values())[3:]
    assert torch.equal(exported.module()(*longer, *weights), Layer()(*longer, *weights))
    assert tensors(exported.module()(*longer, *weights))[0].shape == (15, 16)

"""The checks of csrc/ops on tensors without values: what an op refuses at run time, its fake refuses with the same sentence.

Sizes may be symbols, so they are compared by torch._check alone. What offsets and maps hold is seen by the op only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._needs import Needs

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")
MOST_SLOTS = 2**31 - 2  # rows and slots are int32
Size: TypeAlias = int | torch.SymInt


def check(ok: bool | torch.SymBool, op: str, text: Callable[[], str]) -> None:
    namespace = "moe" if op == "grouped_forward" else "moe_ext"
    torch._check(ok, lambda: f"{namespace}::{op}: {text()}")  # type: ignore[no-untyped-call]


def shape(t: Tensor) -> str:
    return f"[{', '.join(map(str, t.shape))}]"


def dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def check_shape(op: str, t: Tensor, what: str, *expected: Size | None) -> None:
    """None: any size."""

    def text() -> str:
        sizes = ", ".join("*" if n is None else str(n) for n in expected)
        return f"{what} has shape {shape(t)}, expected [{sizes}]"

    check(t.dim() == len(expected), op, text)
    for size, n in zip(t.shape, expected, strict=True):
        if n is not None:
            check(size == n, op, text)


def check_dim(op: str, t: Tensor, what: str, dim: int, expected: str) -> None:
    check(t.dim() == dim, op, lambda: f"{what} has shape {shape(t)}, expected {expected}")


def check_float(op: str, t: Tensor, what: str) -> None:
    check(t.dtype in FLOATS, op, lambda: f"{what} is {dtype(t)}; float64, float32, bfloat16 and float16 are supported")


def check_like(op: str, t: Tensor, what: str, like: Tensor, like_what: str) -> None:
    text = f"{what} is {dtype(t)} but {like_what} is {dtype(like)}; cast one of them, or run under torch.autocast"
    check(t.dtype == like.dtype, op, lambda: text)


def check_int32(op: str, t: Tensor, what: str, size: Size) -> None:
    check(t.dtype == torch.int32, op, lambda: f"{what} is {dtype(t)}, expected int32 as sort_by_expert returns it")
    check_shape(op, t, what, size)
    if isinstance(t.stride(0), int) and t.stride(0) != 1:
        check(t.shape[0] <= 1, op, lambda: f"{what} must be contiguous")


def check_slots(op: str, slots: Size) -> None:
    if isinstance(slots, int):  # of a symbol it would be a bound that the user has to declare
        check(slots <= MOST_SLOTS, op, lambda: f"T*K = {slots} slots exceed the int32 range of rows; split the batch")


def check_activation(
    op: str, *, activation: str = "silu", gated: bool = True, interleaved: bool = False, alpha: float | None = None,
    limit: float | None = None, **_: Any,
) -> None:  # fmt: skip
    known = ", ".join(ACTIVATIONS)
    check(activation in ACTIVATIONS, op, lambda: f"activation='{activation}' is not known; choose one of {known}")
    if activation == "swigluoai":
        check(gated, op, lambda: "activation='swigluoai' multiplies by (up + 1): it needs gated=True")
        check(alpha is not None, op, lambda: "activation='swigluoai' needs alpha (gpt-oss uses 1.702)")
    else:
        text = f"alpha={alpha} has no meaning for activation='{activation}'; only 'swigluoai' has it"
        check(alpha is None, op, lambda: text)
    check(limit is None or (gated and limit > 0), op, lambda: f"limit={limit} needs gated=True and a positive value")
    check(gated or not interleaved, op, lambda: "interleaved=True means gate and up alternate: it needs gated=True")


def check_routing(op: str, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    check_float(op, x, "hidden_states")
    tokens = x.shape[0]
    text = f"top_k_index has shape {shape(top_k_index)}, expected [T={tokens}, K] with K >= 1"
    check(top_k_index.dim() == 2, op, lambda: text)
    check(top_k_index.shape[0] == tokens, op, lambda: text)
    check(top_k_index.shape[1] >= 1, op, lambda: text)
    check_shape(op, top_k_weights, "top_k_weights", tokens, top_k_index.shape[1])
    check_float(op, top_k_weights, "top_k_weights")
    check_ids("sort_by_expert", top_k_index)


def check_ids(op: str, top_k_index: Tensor) -> None:
    check_dim(op, top_k_index, "top_k_index", 2, "[T, K]")
    integer = top_k_index.dtype in (torch.int32, torch.int64)
    check(integer, op, lambda: f"top_k_index is {dtype(top_k_index)}, expected int32 or int64")
    check_slots(op, top_k_index.shape[0] * top_k_index.shape[1])


def check_stacked(
    op: str, like: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, **options: Any
) -> tuple[Size, Size]:
    """The weights of a layer; E and the width of the pre-activation."""
    check_activation(op, **options)
    check_dim(op, like, "hidden_states", 2, "[T, H]")
    transposed, gated, hidden = options.get("transposed", False), options.get("gated", True), like.shape[1]
    layout = " with transposed=True" if transposed else ""
    check_dim(op, gate_up, "gate_up_proj", 3, f"{'[E, H, 2I]' if transposed else '[E, 2I, H]'}{layout}")
    check_dim(op, down, "down_proj", 3, f"{'[E, I, H]' if transposed else '[E, H, I]'}{layout}")
    experts, *sizes = gate_up.shape
    inputs, width = sizes if transposed else sizes[::-1]
    what = f"gate_up_proj has shape {shape(gate_up)}"
    check(experts >= 1, op, lambda: f"{what}: there are no experts")
    check(inputs == hidden, op, lambda: f"{what}{layout}: its experts take {inputs} inputs but hidden_states has H={hidden}")
    if gated:
        check(width % 2 == 0, op, lambda: f"{what}{layout}: gated=True needs 2I outputs, not {width}")
    inner = width // 2 if gated else width
    down_experts, *down_sizes = down.shape
    down_inputs, outputs = down_sizes if transposed else down_sizes[::-1]

    def text() -> str:
        expected = f"expected {experts} experts of {inner} inputs and {hidden} outputs to fit gate_up_proj {shape(gate_up)}"
        return f"down_proj has shape {shape(down)}{layout}, {expected}"

    for found, wanted in ((down_experts, experts), (down_inputs, inner), (outputs, hidden)):
        check(found == wanted, op, text)
    check_like(op, gate_up, "gate_up_proj", like, "hidden_states")
    check_like(op, down, "down_proj", like, "hidden_states")
    for bias, name, n in ((gate_up_bias, "gate_up_bias", width), (down_bias, "down_bias", hidden)):
        if bias is not None:
            check_shape(op, bias, name, experts, n)
            check_like(op, bias, name, like, "hidden_states")
    return experts, width


def check_listed(
    op: str, like: Tensor, gate: list[Tensor], up: list[Tensor], down: list[Tensor], gate_bias: list[Tensor] | None,
    up_bias: list[Tensor] | None, down_bias: list[Tensor] | None, **options: Any,
) -> tuple[int, Size]:  # fmt: skip
    """As _check_stacked, of lists."""
    check_activation(op, **options)
    check_dim(op, like, "hidden_states", 2, "[T, H]")
    check(len(up) > 0, op, lambda: "up_proj is empty: there are no experts")
    check_dim(op, up[0], "up_proj[0]", 2, "[I, H]")
    gated, experts, inner, hidden = options.get("gated", True), len(up), up[0].shape[0], like.shape[1]

    def check_all(tensors: list[Tensor] | None, what: str, count: int, *expected: Size) -> None:
        if tensors is None:
            return
        check(len(tensors) == count, op, lambda: f"{what} has {len(tensors)} entries for {count} experts")
        for t in tensors:
            check_shape(op, t, what, *expected)
            check_like(op, t, what, like, "hidden_states")

    check_all(up, "up_proj", experts, inner, hidden)
    check_all(gate, "gate_proj", experts if gated else 0, inner, hidden)
    check_all(down, "down_proj", experts, hidden, inner)
    check_all(gate_bias, "gate_bias", experts if gated else 0, inner)
    check_all(up_bias, "up_bias", experts, inner)
    check_all(down_bias, "down_bias", experts, hidden)
    return experts, inner * (2 if gated else 1)


def check_rows(op: str, x: Tensor, what: str, expert_offsets: Tensor) -> None:
    check_dim(op, x, what, 2, "[S, *]")
    check_float(op, x, what)
    check_slots(op, x.shape[0])
    text = f"expert_offsets has shape {shape(expert_offsets)}, expected [E+1]"
    check(expert_offsets.dim() == 1, op, lambda: text)
    check(expert_offsets.shape[0] >= 2, op, lambda: text)
    check_int32(op, expert_offsets, "expert_offsets", expert_offsets.shape[0])


def check_mm(op: str, x: Tensor, outputs: Size, inputs: Size, experts: Size, expert_offsets: Tensor) -> None:
    text = f"x has {x.shape[1]} columns but weight maps {inputs} inputs to {outputs} outputs"
    check(x.shape[1] == inputs, op, lambda: text)
    entries = expert_offsets.shape[0]
    check(entries == experts + 1, op, lambda: f"expert_offsets has {entries} entries for E={experts} experts, expected E+1")


def check_maps(op: str, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> Size:
    """S."""
    check_dim(op, row_to_slot, "row_to_slot", 1, "[S]")
    slots = row_to_slot.shape[0]
    text = f"top_k={top_k} does not divide the S={slots} slots of row_to_slot"
    check(top_k >= 1, op, lambda: text)
    check(slots % top_k == 0, op, lambda: text)
    check_int32(op, row_to_slot, "row_to_slot", slots)
    check_int32(op, slot_to_row, "slot_to_row", slots)
    return slots


def check_wgrad(op: str, a: Tensor, b: Tensor, expert_offsets: Tensor) -> None:
    text = f"a has shape {shape(a)} and b {shape(b)}"
    check(a.dim() == 2 and b.dim() == 2, op, lambda: f"{text}, expected [S, M] and [S, N]")
    check_rows(op, a, "a", expert_offsets)
    check(b.shape[0] == a.shape[0], op, lambda: f"{text}; both need the same S rows")
    check_like(op, b, "b", a, "a")


def check_pre_act(op: str, pre_act: Tensor, gated: bool, **options: Any) -> Size:
    """I."""
    check_activation(op, gated=gated, **options)
    check_dim(op, pre_act, "pre_act", 2, "[S, 2I], or [S, I] with gated=False")
    columns = pre_act.shape[1]
    if gated:
        check(columns % 2 == 0, op, lambda: f"pre_act has {columns} columns; gated=True needs gate and up, 2I")
    check_float(op, pre_act, "pre_act")
    return columns // 2 if gated else columns


def check_saved(
    op: str, grad: Tensor, x: Tensor | None, top_k_weights: Tensor, pre_act: Tensor | None, maps: tuple[Tensor, ...], experts: Size,
    width: Size, needs: Needs,
) -> None:  # fmt: skip
    """What the backward gets from the forward."""
    check_dim(op, grad, "hidden_states", 2, "[T, H]")
    check_float(op, grad, "hidden_states")
    tokens = grad.shape[0]
    text = f"top_k_weights has shape {shape(top_k_weights)}, expected [T={tokens}, K]"
    check(top_k_weights.dim() == 2, op, lambda: text)
    check(top_k_weights.shape[0] == tokens, op, lambda: text)
    check_float(op, top_k_weights, "top_k_weights")
    top_k = top_k_weights.shape[1]
    check(top_k >= 1, op, lambda: f"top_k_weights has shape {shape(top_k_weights)}, expected K >= 1")
    slots = tokens * top_k
    if pre_act is not None:
        check_shape(op, pre_act, "pre_act", slots, width)
        check_like(op, pre_act, "pre_act", grad, "grad")
    for t, what, size in zip(maps, ("expert_offsets", "row_to_slot", "slot_to_row"), (experts + 1, slots, slots), strict=True):
        check_int32(op, t, what, size)
    if needs & (Needs.GATE_UP | Needs.UP) or pre_act is None:
        why = "to form the pre-activation again" if pre_act is None else "for the gradient of the up projection"
        check(x is not None, op, lambda: f"hidden_states is needed {why}")
        assert x is not None
        check_shape(op, x, "hidden_states", *grad.shape)
        check_like(op, x, "hidden_states", grad, "grad")

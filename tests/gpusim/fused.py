"""Calls the fused kernels of the simulated library by themselves: the parameter structs of csrc/kernels/params.h in ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ext.experts import ExpertSpec
from tests.gpusim.harness import folder

DTYPES = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 1, torch.float64: 0}
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")
STATUS = {0: "ok", 1: "unsupported dtype", 2: "unsupported layout", 3: "launch failed"}
Pointer = ctypes.c_void_p
Int = ctypes.c_int64


class Activation(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int8), ("gated", ctypes.c_bool), ("interleaved", ctypes.c_bool), ("has_limit", ctypes.c_bool),
                ("alpha", ctypes.c_double), ("limit", ctypes.c_double)]  # fmt: skip


class Rows(ctypes.Structure):
    _fields_ = [("data", Pointer), ("stride", Int), ("row_to_slot", Pointer), ("top_k", ctypes.c_int32)]


class WeightTable(ctypes.Structure):
    _fields_ = [("base", Pointer), ("stride_e", Int), ("list", Pointer), ("stride_n", Int), ("stride_k", Int)]


class BiasTable(ctypes.Structure):
    _fields_ = [("base", Pointer), ("stride_e", Int), ("list", Pointer), ("stride_n", Int)]


class GroupedUpParams(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int8), ("activation", Activation), ("x", Rows), ("gate_proj", WeightTable), ("up_proj", WeightTable),
                ("gate_bias", BiasTable), ("up_bias", BiasTable), ("expert_offsets", Pointer), ("S", Int), ("E", Int), ("H", Int),
                ("I", Int), ("pre_act", Pointer), ("out", Pointer)]  # fmt: skip


class OutputTable(ctypes.Structure):
    _fields_ = [("base", Pointer), ("stride_e", Int), ("list", Pointer), ("stride", Int)]


class GroupedMmWgradParams(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int8), ("a", Rows), ("b", Rows), ("expert_offsets", Pointer), ("S", Int), ("E", Int), ("M", Int),
                ("N", Int), ("out", OutputTable)]  # fmt: skip


class GatedActivationBackwardParams(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int8), ("activation", Activation), ("grad", Pointer), ("pre_act", Pointer), ("expert_offsets", Pointer),
                ("row_to_slot", Pointer), ("slot_weights", Pointer), ("S", Int), ("I", Int), ("E", Int), ("H", Int), ("grad_pre", Pointer),
                ("scaled", Pointer), ("grad_slot_weights", Pointer), ("grad_out", Rows), ("down_bias", BiasTable)]  # fmt: skip


class GroupedDownBackwardParams(ctypes.Structure):
    _fields_ = [("through", GatedActivationBackwardParams), ("grad", Rows), ("down_proj", WeightTable)]


Stack = Tensor | Sequence[Tensor]


def _list(tensors: Sequence[Tensor], keep: list[Any]) -> int | None:
    pointers = (Pointer * len(tensors))(*(t.data_ptr() for t in tensors))
    keep.append(pointers)
    return ctypes.addressof(pointers)


def weight_table(w: Stack, keep: list[Any]) -> WeightTable:
    """`w` is E x (N, K): a tensor with any strides, or a list."""
    if isinstance(w, Tensor):
        return WeightTable(w.data_ptr(), w.stride(0), None, w.stride(1), w.stride(2))
    return WeightTable(None, 0, _list(w, keep), w[0].stride(0), w[0].stride(1))


def bias_table(b: Stack | None, keep: list[Any]) -> BiasTable:
    if b is None:
        return BiasTable(None, 0, None, 1)
    if isinstance(b, Tensor):
        return BiasTable(b.data_ptr(), b.stride(0), None, b.stride(1))
    return BiasTable(None, 0, _list(b, keep), 1)


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def activation_of(spec: ExpertSpec) -> Activation:
    limited = spec.limit is not None
    return Activation(KINDS.index(spec.activation), spec.gated, spec.interleaved, limited, spec.alpha or 1.0, spec.limit or 0.0)


def run(name: str, params: ctypes.Structure) -> str:
    """ "ok" or the Status of the kernel, in words."""
    function = getattr(ctypes.CDLL(str(folder() / "libmoe_cuda_sim.so")), f"moe_simulated_{name}")
    function.argtypes = [Pointer, Int, ctypes.POINTER(Int), Pointer]
    size, needed = ctypes.sizeof(params), Int()
    status = function(ctypes.addressof(params), size, ctypes.byref(needed), None)
    if status == 0:
        workspace = torch.empty(max(needed.value, 1), dtype=torch.uint8)
        status = function(ctypes.addressof(params), size, ctypes.byref(needed), workspace.data_ptr())
    assert status >= 0, "the struct here is not that of params.h" if status == -1 else f"the library has no {name}"
    return STATUS[status]


def grouped_up(
    x: Tensor, row_to_slot: Tensor, top_k: int, expert_offsets: Tensor, weights: tuple[Stack, Stack], bias: tuple[Stack, Stack] | None,
    spec: ExpertSpec, pre_act: Tensor | None, out: Tensor,
) -> str:  # fmt: skip
    """out and pre_act are written; weights and bias are those of gate and up."""
    keep: list[Any] = []
    S, I = out.shape  # noqa: E741
    tables = [weight_table(w, keep) for w in weights] + [bias_table(b, keep) for b in bias or (None, None)]
    p = GroupedUpParams(
        DTYPES[x.dtype], activation_of(spec), Rows(x.data_ptr(), x.stride(0), row_to_slot.data_ptr(), top_k), *tables,
        expert_offsets.data_ptr(), S, len(expert_offsets) - 1, x.shape[1], I, address(pre_act), out.data_ptr(),
    )  # fmt: skip
    return run("grouped_up", p)


def rows(t: Tensor, row_to_slot: Tensor | None = None, top_k: int = 1) -> Rows:
    return Rows(t.data_ptr(), t.stride(0), None if row_to_slot is None else row_to_slot.data_ptr(), top_k)


def grouped_mm_wgrad(a: Rows, b: Rows, expert_offsets: Tensor, S: int, out: Stack) -> str:
    """`out` is written: E x (M, N), whose rows may lie further apart."""
    keep: list[Any] = []
    first = out[0]
    if isinstance(out, Tensor):
        table = OutputTable(out.data_ptr(), out.stride(0), None, first.stride(0))
    else:
        table = OutputTable(None, 0, _list(out, keep), first.stride(0))
    return run(
        "grouped_mm_wgrad",
        GroupedMmWgradParams(DTYPES[first.dtype], a, b, expert_offsets.data_ptr(), S, len(out), *first.shape, table),
    )


def grouped_down_backward(
    grad: Tensor, row_to_slot: Tensor, top_k: int, expert_offsets: Tensor, down: Stack, bias: Stack | None, spec: ExpertSpec,
    pre_act: Tensor, weights: Tensor | None, grad_pre: Tensor | None, scaled: Tensor | None, grad_weights: Tensor | None,
) -> str:  # fmt: skip
    """grad_pre, scaled and grad_weights are written where they are given; `down` is E x (I, H), as the product's outputs and inputs."""
    keep: list[Any] = []
    S, I = pre_act.shape[0], pre_act.shape[1] // 2  # noqa: E741
    rows = Rows(grad.data_ptr(), grad.stride(0), row_to_slot.data_ptr(), top_k)
    through = GatedActivationBackwardParams(
        DTYPES[grad.dtype], activation_of(spec), None, pre_act.data_ptr(), expert_offsets.data_ptr(), row_to_slot.data_ptr(),
        address(weights), S, I, len(expert_offsets) - 1, grad.shape[1], address(grad_pre), address(scaled), address(grad_weights), rows,
        bias_table(bias, keep),
    )  # fmt: skip
    return run("grouped_down_backward", GroupedDownBackwardParams(through, rows, weight_table(down, keep)))

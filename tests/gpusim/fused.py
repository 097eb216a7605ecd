"""Calls the fused kernels of the simulated library by themselves: the parameter structs of csrc/kernels/params.h in ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpusim.harness import folder
from moe_ext.experts import ExpertSpec

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


def run(name: str, params: ctypes.Structure) -> str:
    """The Status of the kernel in words, "ok" when it ran."""
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
    activation = Activation(
        KINDS.index(spec.activation), True, spec.interleaved, spec.limit is not None, spec.alpha or 1.0, spec.limit or 0.0
    )
    tables = [weight_table(w, keep) for w in weights] + [bias_table(b, keep) for b in bias or (None, None)]
    p = GroupedUpParams(
        DTYPES[x.dtype], activation, Rows(x.data_ptr(), x.stride(0), row_to_slot.data_ptr(), top_k), *tables, expert_offsets.data_ptr(),
        S, len(expert_offsets) - 1, x.shape[1], I, None if pre_act is None else pre_act.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return run("grouped_up", p)

"""The compiled ops, `torch.ops.moe.*`, as typed functions; importing this loads the libraries.

Words: T tokens, K = top_k, E experts, H hidden size, I intermediate size. A slot is one (token, k) pair, numbered `t*K + k`, and
there are S = T*K of them; a row is a position in expert-sorted order. All float tensors of one call share a dtype (float64,
float32, bfloat16 or float16) and a device; sums run in float32 (float64 for float64). Results have shapes that do not depend on
the routing, and repeat bit for bit. Bad input raises RuntimeError with the values in it, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).parent
CPU_LIBRARY = _HERE / "libmoe_cpu.so"
CUDA_LIBRARY = _HERE / "libmoe_cuda.so"


def _load() -> None:
    # The schemas may be registered once per process, and registering them again would end it: a host that has loaded the
    # library by itself (an embedded interpreter, another import path) is served as it is.
    if hasattr(torch.ops.moe, "grouped_forward"):
        return
    if not CPU_LIBRARY.exists():
        raise ImportError(f"{CPU_LIBRARY.name} is missing beside moe_ext/ops.py; build it with: pip install --no-build-isolation -e .")
    torch.ops.load_library(str(CPU_LIBRARY))
    if CUDA_LIBRARY.exists():
        torch.ops.load_library(str(CUDA_LIBRARY))


_load()

from . import _autograd as _autograd  # noqa: E402  (needs the loaded schemas)
from . import _fake as _fake  # noqa: E402

moe = torch.ops.moe


def grouped_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """The expert layer over stacked weights: `out[t] = sum_k w[t,k] * down_e(act(gate_e x[t]) * up_e x[t])`, `e = top_k_index[t,k]`.

    hidden_states: `[T, H]`. top_k_index: `[T, K]` int32 or int64; an id outside `[0, E)` drops its slot (the expert-parallel
    sentinel). top_k_weights: `[T, K]`, any float dtype, never rounded to a lower one.
    gate_up_proj: `[E, 2I, H]`, rows `[gate | up]`, or alternating with `interleaved`; `[E, I, H]` when not `gated`.
    down_proj: `[E, H, I]`. With `transposed`: `[E, H, 2I]` and `[E, I, H]`. Biases: `[E, 2I]` and `[E, H]`.
    activation, alpha, limit: see `moe_ext.reference.activation`.
    recompute: training keeps hidden_states and the routing only, 2H bytes per token in bfloat16 instead of 2H + 4KI, and its backward
    forms the pre-activation again.
    Returns `[T, H]` in the dtype of hidden_states. Gradients flow to hidden_states, top_k_weights, weights and biases, each only
    when needed; a second derivative raises.
    """
    return moe.grouped_forward(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias,
        activation=activation, gated=gated, transposed=transposed, interleaved=interleaved, alpha=alpha, limit=limit,
        recompute=recompute,
    )  # fmt: skip


def grouped_forward_list(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    gate_bias: Sequence[Tensor] | None = None,
    up_bias: Sequence[Tensor] | None = None,
    down_bias: Sequence[Tensor] | None = None,
    *,
    activation: str = "silu",
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """`grouped_forward` over E separate matrices each: gate_proj, up_proj `[I, H]`, down_proj `[H, I]`; biases `[I]`, `[I]`, `[H]`.

    Nothing is stacked or copied, and gradients reach each parameter. With `gated=False`, gate_proj is an empty list.
    """
    return moe.grouped_forward.list(
        hidden_states, top_k_index, top_k_weights, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias,
        activation=activation, gated=gated, alpha=alpha, limit=limit, recompute=recompute,
    )  # fmt: skip


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable counting sort of the slots of `top_k_index` `[T, K]` by expert.

    Returns int32 `expert_offsets [E+1]` (rows of expert e are `expert_offsets[e]` to `expert_offsets[e+1]`),
    `row_to_slot [S]` and its inverse `slot_to_row [S]`; -1 marks unused rows and dropped slots. `expert_offsets[1:]` is what
    `torch.nn.functional.grouped_mm` calls `offs`.
    """
    return moe.sort_by_expert(top_k_index, num_experts)


def permute(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> Tensor:
    """`x [T, H]` to expert-sorted rows `[S, H]`; unused rows are zero. Its gradient is `unpermute`."""
    return moe.permute(x, row_to_slot, slot_to_row, top_k)


def unpermute(rows: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, top_k_weights: Tensor | None = None) -> Tensor:
    """`rows [S, H]` to `[T, H]`: the sum over k, in order and without atomics, of each token's rows times `top_k_weights [T, K]`."""
    return moe.unpermute(rows, row_to_slot, slot_to_row, top_k, top_k_weights)


def grouped_mm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    expert_offsets: Tensor,
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """`out[r] = x[r] @ weight[e].T + bias[e]` for the rows r of each expert e.

    x: `[S, K]`, sorted by expert. weight: `[E, N, K]` (`transposed`: `[E, K, N]`) or E matrices. bias: `[E, N]` or E vectors.
    Returns `[S, N]`; rows past `expert_offsets[E]` are zero and their inputs are never read.
    """
    overload = moe.grouped_mm.default if isinstance(weight, Tensor) else moe.grouped_mm.list
    return overload(x, weight, expert_offsets, bias, transposed=transposed)


def grouped_mm_wgrad(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """`out[e] = a[rows of e].T @ b[rows of e]`: `[S, M]`, `[S, N]` to `[E, M, N]`; exactly zero for an expert without rows."""
    return moe.grouped_mm_wgrad.default(a, b, expert_offsets)


def gated_activation(
    pre_act: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """`act(gate) * up`: `[S, 2I]` to `[S, I]`, or `act(x)` with `gated=False`; formulas in `moe_ext.reference.activation`."""
    return moe.gated_activation(pre_act, activation=activation, gated=gated, interleaved=interleaved, alpha=alpha, limit=limit)

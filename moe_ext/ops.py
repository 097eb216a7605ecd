"""The compiled ops as typed functions: `torch.ops.moe.grouped_forward`, and `torch.ops.moe_ext.*` for the others. Importing this module
loads the libraries.

T tokens, K experts per token, E experts, H hidden size, I intermediate size. A slot is one (token, k) pair, numbered `t * K + k`;
there are S = T * K slots. A row is a position in the order sorted by expert.

All float tensors of one call share a dtype (float64, float32, bfloat16 or float16) and a device. Sums run in float32, or in float64
for float64. The shapes of results do not depend on the routing, and two runs return the same bits. Every function raises
RuntimeError for tensors that do not fit, before anything is computed; the message states the offending values.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

_HERE = Path(__file__).parent
CPU_LIBRARY = _HERE / "libmoe_cpu.so"
CUDA_LIBRARY = _HERE / "libmoe_cuda.so"


def _load() -> None:
    # The schemas may be registered once per process, and registering them again would end it: a host that has loaded the
    # library by itself (an embedded interpreter, another import path) is served as it is.
    if hasattr(torch.ops.moe_ext, "grouped_mm"):
        return
    # Loading would end the process too where another package has an op of this name: the namespace is shared.
    if other := torch._C._dispatch_dump("moe::grouped_forward"):
        by = re.search(r"registered at (.+)", other)
        raise ImportError(
            f"another library has registered moe::grouped_forward ({by[1] if by else 'it does not say where'}), the one op that moe_ext "
            "shares a namespace for; import moe_ext without it, in a process of its own"
        )
    if not CPU_LIBRARY.exists():
        raise ImportError(_missing())
    torch.ops.load_library(str(CPU_LIBRARY))
    if CUDA_LIBRARY.exists():
        torch.ops.load_library(str(CUDA_LIBRARY))


def _missing() -> str:
    """Why the library is not there, and what to do. Python finds a source folder that it was started in before what is installed."""
    root, build = _HERE.parent, "pip install --no-build-isolation -e ."
    if not (root / "csrc").is_dir():
        return f"{CPU_LIBRARY.name} is missing beside moe_ext/ops.py; build it with: {build}"
    other = PathFinder.find_spec("moe_ext", [path for path in sys.path if Path(path).resolve() != root.resolve()])
    folders = [] if other is None else [Path(folder) for folder in other.submodule_search_locations or ()]
    installed = next((folder for folder in folders if (folder / CPU_LIBRARY.name).exists()), None)
    here = f"{CPU_LIBRARY.name} is missing beside moe_ext/ops.py: moe_ext was imported from its source folder {root}, which is not built"
    use = "" if installed is None else f"start Python in another folder to use the one installed in {installed.parent}, or "
    return f"{here}; {use}build here with: {build}"


_load()

from . import _autograd as _autograd  # noqa: E402  (needs the loaded schemas)
from . import _fake as _fake  # noqa: E402
from . import _flops as _flops  # noqa: E402

moe = torch.ops.moe
moe_ext = torch.ops.moe_ext


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
    """Computes an expert layer over stacked weights.

    `out[t] = sum_k top_k_weights[t,k] * down_e(act(gate_e x[t]) * up_e x[t])` with `e = top_k_index[t,k]`.

    Gradients flow to hidden_states, top_k_weights, weights and biases. Each is computed only if it is needed.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]`, int32 or int64. An id outside `[0, E)` drops its slot (expert-parallel code relies on that).
        top_k_weights: `[T, K]`, any float dtype. They are not rounded to a lower one.
        gate_up_proj: `[E, 2I, H]`, `[E, I, H]` if not gated, `[E, H, 2I]` if transposed.
        down_proj: `[E, H, I]`, `[E, I, H]` if transposed.
        gate_up_bias: `[E, 2I]`, `[E, I]` if not gated.
        down_bias: `[E, H]`.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "swigluoai"; formulas in `moe_ext.reference.activation`.
        gated: Whether the layer computes `act(gate) * up`, or only `act(up)`.
        transposed: Whether the stacks are `[E, in, out]`.
        interleaved: Whether gate and up alternate along 2I. Otherwise the first half is gate and the second half is up.
        alpha: The factor of "swigluoai"; required there, not allowed elsewhere.
        limit: Clamps `gate <= limit` and `-limit <= up <= limit` before the activation.
        recompute: Whether training keeps only hidden_states and the routing. The backward pass then computes the pre-activation
            again. In bfloat16 that is 2H bytes per token instead of 2H + 4KI, without the routing.

    Returns:
        `[T, H]`, in the dtype of hidden_states.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not fit, or if an option has no meaning for the activation.
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
    """Computes an expert layer over one matrix per expert: `grouped_forward` without stacking or copying.

    Each matrix gets a gradient of its own.

    Args:
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]`, int32 or int64. An id outside `[0, E)` drops its slot.
        top_k_weights: `[T, K]`, any float dtype.
        gate_proj: E matrices `[I, H]`. An empty list if not gated.
        up_proj: E matrices `[I, H]`.
        down_proj: E matrices `[H, I]`.
        gate_bias: E vectors `[I]`.
        up_bias: E vectors `[I]`.
        down_bias: E vectors `[H]`.
        activation: As in `grouped_forward`.
        gated: As in `grouped_forward`.
        alpha: As in `grouped_forward`.
        limit: As in `grouped_forward`.
        recompute: As in `grouped_forward`.

    Returns:
        `[T, H]`, in the dtype of hidden_states.

    Raises:
        RuntimeError: If a list has another length than E, or for the reasons of `grouped_forward`.
    """
    return moe.grouped_forward.list(
        hidden_states, top_k_index, top_k_weights, gate_proj, up_proj, down_proj, gate_bias, up_bias, down_bias,
        activation=activation, gated=gated, alpha=alpha, limit=limit, recompute=recompute,
    )  # fmt: skip


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots by expert, with a stable counting sort.

    Args:
        top_k_index: `[T, K]`, int32 or int64. An id outside `[0, num_experts)` drops its slot.
        num_experts: E.

    Returns:
        Three int32 tensors. `expert_offsets [E+1]`: the rows of expert e are `expert_offsets[e]` to `expert_offsets[e+1]`;
            `expert_offsets[1:]` is what `torch.nn.functional.grouped_mm` calls `offs`. `row_to_slot [S]`: the slot of each row, -1 for
            unused rows. `slot_to_row [S]`: its inverse, -1 for dropped slots.

    Raises:
        RuntimeError: If top_k_index has another shape or dtype, or if num_experts is less than 1.
    """
    return moe_ext.sort_by_expert(top_k_index, num_experts)


def permute(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int) -> Tensor:
    """Gathers tokens into rows that are sorted by expert. Its gradient is `unpermute`.

    Args:
        x: `[T, H]`.
        row_to_slot: `[S]`, from `sort_by_expert`.
        slot_to_row: `[S]`, from `sort_by_expert`.
        top_k: K.

    Returns:
        `[S, H]`. Unused rows are zero.

    Raises:
        RuntimeError: If x does not have S / top_k rows, or if the maps do not fit.
    """
    return moe_ext.permute(x, row_to_slot, slot_to_row, top_k)


def unpermute(rows: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, top_k_weights: Tensor | None = None) -> Tensor:
    """Adds the rows of each token up, in the order of k and without atomics.

    Args:
        rows: `[S, H]`, sorted by expert.
        row_to_slot: `[S]`, from `sort_by_expert`.
        slot_to_row: `[S]`, from `sort_by_expert`.
        top_k: K.
        top_k_weights: `[T, K]`, the factors of the rows. Without it the factors are 1.

    Returns:
        `[T, H]`.

    Raises:
        RuntimeError: If top_k does not divide S, or if shapes do not fit.
    """
    return moe_ext.unpermute(rows, row_to_slot, slot_to_row, top_k, top_k_weights)


def grouped_mm(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    expert_offsets: Tensor,
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiplies the rows of each expert with its matrix: `out[r] = x[r] @ weight[e].T + bias[e]` for the rows r of expert e.

    Args:
        x: `[S, K]`, sorted by expert. (K is the inner size of the product here.)
        weight: `[E, N, K]`, or `[E, K, N]` if transposed; or E matrices of these shapes.
        expert_offsets: `[E+1]`, from `sort_by_expert`.
        bias: `[E, N]`, or E vectors.
        transposed: Whether the matrices are `[in, out]`.

    Returns:
        `[S, N]`. Rows past `expert_offsets[E]` are zero, and these rows of x are never read.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not fit, or if a list is empty or of another length.
    """
    overload = moe_ext.grouped_mm.default if isinstance(weight, Tensor) else moe_ext.grouped_mm.list
    return overload(x, weight, expert_offsets, bias, transposed=transposed)


def grouped_mm_wgrad(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """Sums the outer products of each expert's rows: `out[e] = a[rows of e].T @ b[rows of e]`. This is a weight gradient.

    Args:
        a: `[S, M]`, sorted by expert.
        b: `[S, N]`, sorted by expert.
        expert_offsets: `[E+1]`, from `sort_by_expert`.

    Returns:
        `[E, M, N]`. It is exactly zero for an expert without rows.

    Raises:
        RuntimeError: If a and b have different numbers of rows, dtypes or devices.
    """
    return moe_ext.grouped_mm_wgrad.default(a, b, expert_offsets)


def gated_activation(
    pre_act: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """Applies an activation: `act(gate) * up`, or `act(pre_act)` if not gated. Formulas: `moe_ext.reference.activation`.

    Args:
        pre_act: `[S, 2I]`, or `[S, I]` if not gated.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "swigluoai".
        gated: Whether pre_act holds gate and up.
        interleaved: Whether gate and up alternate along 2I.
        alpha: The factor of "swigluoai"; required there, not allowed elsewhere.
        limit: Clamps `gate <= limit` and `-limit <= up <= limit` before the activation.

    Returns:
        `[S, I]`.

    Raises:
        RuntimeError: If pre_act has an odd number of columns though gated, or if an option has no meaning for the activation.
    """
    return moe_ext.gated_activation(pre_act, activation=activation, gated=gated, interleaved=interleaved, alpha=alpha, limit=limit)

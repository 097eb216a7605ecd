"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: two for each multiplication of their products.

Every slot counts as a row, since the routing is not looked at. Arguments are shapes: of a list of matrices, a list of shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._needs import Needs

moe = torch.ops.moe
moe_ext = torch.ops.moe_ext


def _matrix(weight: Sequence[Any]) -> tuple[int, int]:
    """The shape of one expert's matrix."""
    rows, columns = weight[0] if isinstance(weight[0], Sequence) else weight[-2:]
    return rows, columns


def _widths(up: tuple[Any, ...], options: dict[str, Any]) -> int:
    """The columns of the pre-activation. up: gate_up, or the lists gate and up."""
    if len(up) == 2:
        return _matrix(up[1])[0] * (2 if options.get("gated", True) else 1)
    return _matrix(up[0])[1 if options.get("transposed", False) else 0]


def _split(weights: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Up projections and down projection, from the arguments from the weights on. Stacks have three dimensions."""
    count = 1 if not isinstance(weights[1][0], Sequence) else 2
    return weights[:count], weights[count]


@register_flop_formula([moe_ext.grouped_mm])
def _(x: Any, weight: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    rows, columns = _matrix(weight)
    return int(2 * x[0] * rows * columns)


@register_flop_formula([moe_ext.grouped_mm_wgrad])
def _(a: Any, b: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


@register_flop_formula([moe.grouped_forward, moe_ext._grouped_forward_train])
def _(x: Any, top_k_index: Any, top_k_weights: Any, *weights: Any, out_shape: Any = None, **options: Any) -> int:
    ups, down = _split(weights)
    rows, columns = _matrix(down)
    return int(2 * top_k_index[0] * top_k_index[1] * (x[1] * _widths(ups, options) + rows * columns))


@register_flop_formula([moe_ext._grouped_backward])
def _(
    grad: Any, x: Any, top_k_weights: Any, pre_act: Any, expert_offsets: Any, row_to_slot: Any, slot_to_row: Any, *weights: Any,
    out_shape: Any = None, **options: Any,
) -> int:  # fmt: skip
    ups, down = _split(weights)
    rows, columns = _matrix(down)
    needs, up = Needs(options["needs"]), grad[1] * _widths(ups, options)
    products = rows * columns if needs & ~(Needs.DOWN | Needs.DOWN_BIAS) else 0
    products += rows * columns if Needs.DOWN in needs else 0
    products += up if Needs.HIDDEN_STATES in needs else 0
    products += up if needs & (Needs.GATE_UP | Needs.UP) else 0
    products += up if pre_act is None else 0  # computed again
    return int(2 * row_to_slot[0] * products)

"""Which gradients a backward op computes: the same bits as `Needs` in csrc/ops/ops.h. Results come in the order of the bits."""

from __future__ import annotations

from enum import IntFlag


class Needs(IntFlag):
    HIDDEN_STATES = 1
    TOP_K_WEIGHTS = 2
    GATE_UP = 4  # stacked gate_up_proj, or gate_proj of a list
    UP = 8  # list only
    DOWN = 16
    GATE_UP_BIAS = 32  # stacked gate_up_bias, or gate_bias of a list
    UP_BIAS = 64  # list only
    DOWN_BIAS = 128

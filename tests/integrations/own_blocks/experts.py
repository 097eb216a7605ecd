"""MLPs with the names, orders, biases and activations that model code gives them. All are made by `(hidden, inner)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Numbered(nn.Module):
    """w2 is the way down, and the activation is a function in the forward."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class NumberedOtherwise(Numbered):
    """The names of `Numbered`, where w3 is activated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x) * F.silu(self.w3(x)))


class Swapped(Gated):
    """The activation is on what is called up."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Backwards(nn.Module):
    """Made in the order down, up, gate, with names that mean nothing."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.lin_c = nn.Linear(inner, hidden)
        self.lin_b = nn.Linear(hidden, inner)
        self.lin_a = nn.Linear(hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin_c(self.lin_b(x) * F.gelu(self.lin_a(x), approximate="tanh"))


class Ungated(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class OutputFirst(nn.Module):
    """Ungated, the way down made first, squared relu."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.wo = nn.Linear(inner, hidden, bias=False)
        self.wi = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)).square())


class Sequential(nn.Module):
    """An `nn.Sequential` inside, as many short scripts have it."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class HalfBiased(Gated):
    """A bias on the way down alone."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden, bias=True)


class NoDropout(Gated):
    """A dropout that drops nothing."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(hidden, inner, bias=True)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class InFloat32(Gated):
    """Computes its activation in float32, whatever its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x).to(torch.float32)).to(x.dtype) * self.up_proj(x))


#: Experts that must be enabled whatever the names of their parts.
KINDS = (
    Gated, Numbered, NumberedOtherwise, Swapped, Backwards, Ungated, OutputFirst, HalfBiased, NoDropout, InFloat32,
)  # fmt: skip

"""The error rule, for our tests and for yours.

A result is accepted when its error against the float64 truth is at most twice the error that plain PyTorch makes in the same
dtype. No tolerance appears anywhere: the yardstick is measured on the same inputs. Where plain PyTorch happens to be exact
(an identity, a copy, one term in a sum), the yardstick is the rounding of the truth itself to that dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: New error / plain error that is still accepted. The one number of the rule.
ERROR_RATIO = 2.0


@dataclass(frozen=True)
class ErrorReport:
    """Errors are relative, in the Euclidean norm: `|x - truth| / |truth|` (absolute where the truth is zero)."""

    new: float
    plain: float

    @property
    def ok(self) -> bool:
        return self.new <= ERROR_RATIO * self.plain

    @property
    def ratio(self) -> float:
        return self.new / self.plain if self.plain else (0.0 if self.new == 0 else float("inf"))

    def __str__(self) -> str:
        return f"error {self.new:.3e} against plain PyTorch's {self.plain:.3e} (ratio {self.ratio:.2f}, allowed {ERROR_RATIO:g})"


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """`|x - truth| / |truth|`, computed in float64; NaN or infinity in `x` where the truth is finite gives infinity."""
    x, truth = x.detach().double(), truth.detach().double()
    if x.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(truth.shape)}")
    if x.numel() == 0:
        return 0.0
    scale = truth.norm().item()
    error = (x - truth).norm().item() / (scale or 1.0)
    return error if error == error else float("inf")


def compare(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> ErrorReport:
    """Measures `new` and `plain` (same dtype) against `truth` (float64)."""
    if new.dtype != plain.dtype:
        raise ValueError(f"dtypes differ: new {new.dtype}, plain {plain.dtype}")
    rounding = relative_error(truth.to(new.dtype), truth)
    return ErrorReport(relative_error(new, truth), max(relative_error(plain, truth), rounding))


def assert_accurate(new: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Raises AssertionError with both errors unless `new` obeys the error rule."""
    report = compare(new, plain, truth)
    assert report.ok, f"{what}: {report}"

"""By which formula a set of experts computes: activations and gates are evaluated in float64 beside `moe_ext.reference`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..experts import ACTIVATIONS, ExpertSpec
from . import transformers_facts
from .sandbox import sandbox

#: Two functions are the same when they differ by less than this, relative to 1 + |value|, in float64: below the rounding of
#: float32, and above what a constant written with ten digits makes (the tanh forms of GELU differ by 4e-12).
SAME_FUNCTION = 2.0**-34


@dataclass(frozen=True)
class Formula:
    """A spec without functions in it (it can be pickled), and which of the module's own functions belong into it at call time."""

    spec: ExpertSpec
    own_gate: bool = False
    own_post_norm: bool = False

    @property
    def path(self) -> str:
        return "composed" if self.own_gate or self.own_post_norm else "fused"

    @property
    def read_anew(self) -> frozenset[str]:
        """The attributes of the module whose code is called as it is at each call: no formula was read from it."""
        gate = {"_apply_gate", "act_fn"} if self.own_gate else set()
        return frozenset(gate | ({"post_expert_norm"} if self.own_post_norm else set()))

    def with_recompute(self, recompute: bool) -> Formula:
        return replace(self, spec=replace(self.spec, recompute=recompute))

    def resolve(self, module: nn.Module) -> ExpertSpec:
        """The spec with the module's own functions in it, as they are at this moment."""
        if not (self.own_gate or self.own_post_norm):
            return self.spec
        gate = (module._apply_gate if self.spec.gated else module.act_fn) if self.own_gate else None
        return replace(self.spec, gate_fn=gate, post_norm=module.post_expert_norm if self.own_post_norm else None)


def own_formula(module: nn.Module) -> Formula:
    """The formula that leaves gate, activation and norm to a decorated module: right for each of them, and never fused."""
    gated, transposed, concatenated, post_norm = (
        transformers_facts.flag(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "has_post_expert_norm")
    )
    spec = ExpertSpec(gated=gated, transposed=transposed, interleaved=gated and not concatenated)
    return Formula(spec, own_gate=True, own_post_norm=post_norm)


def decorated_formula(module: nn.Module) -> Formula:
    """`own_formula` with the gate recognised, if it is one of `reference.activation`."""
    own = own_formula(module)
    with sandbox(module) as box:
        module = box.module
        if own.spec.gated:
            # Without the flag the gate may be of either kind, and only one of them computes what it does.
            kinds = [own.spec] if hasattr(module, "is_concatenated") else [own.spec, replace(own.spec, interleaved=True)]
            specs = [replace(kind, **options) for kind in kinds for options in gate_candidates(module)]
            match = next((spec for spec in specs if _same_gate(module._apply_gate, spec)), None)
        else:
            name = activation_name(module.act_fn)
            match = None if name is None else replace(own.spec, activation=name)
    return own if match is None else replace(own, spec=match, own_gate=False)


def gate_candidates(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Activations with the numbers that `module` holds for them, the likely ones first."""
    act_fn = getattr(module, "act_fn", None)
    name = None if act_fn is None else activation_name(act_fn)
    names = ["silu"] if name is None else [name]
    limits = [None, *_numbers(module, "limit")]
    for limit in limits:
        yield from ({"activation": name, "limit": limit} for name in names)
        yield from ({"activation": "swigluoai", "alpha": alpha, "limit": limit} for alpha in _numbers(module, "alpha"))


def plain_candidates(module: nn.Module, gated: bool) -> Iterator[Formula]:
    """Formulas that a module without transformers' flags may compute by, in the order they are worth trying.

    Its own activation, found among its attributes and those of its children, or all of them; last its own `_apply_gate`.
    """
    known = list(dict.fromkeys(name for f in _functions(module) if (name := activation_name(f)) is not None))
    if gated:
        for limit in (None, *_numbers(module, "limit")):
            yield from (Formula(ExpertSpec("swigluoai", alpha=alpha, limit=limit)) for alpha in _numbers(module, "alpha"))
            yield from (Formula(ExpertSpec(name, limit=limit)) for name in known)
        if hasattr(module, "_apply_gate"):
            yield Formula(ExpertSpec(), own_gate=True)
    else:
        yield from (Formula(ExpertSpec(name, gated=False)) for name in known)
    if not known:
        yield from (Formula(ExpertSpec(name, gated=gated)) for name in ACTIVATIONS if name != "swigluoai")


def _functions(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    for part in (module, *module.children()):
        for value in (*vars(part).values(), *part._modules.values()):
            small = isinstance(value, nn.Module) and not any(True for _ in value.parameters())
            if callable(value) and (small or not isinstance(value, (nn.Module, type))):
                yield value


def _numbers(module: nn.Module, word: str) -> list[float]:
    """Positive numbers among the attributes whose name ends in `word`: `limit` and `swiglu_limit`, `alpha` and `swiglu_alpha`."""
    values = (value for name, value in vars(module).items() if name.endswith(word))
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < float("inf")]


def _same_gate(gate: Callable[[Tensor], Tensor], spec: ExpertSpec) -> bool:
    # Random signs and magnitudes from well inside to well beyond any clamp, both halves independently.
    generator = torch.Generator("cpu").manual_seed(0)
    reach = 4 * max(1.0, spec.limit or 0.0)
    x = torch.randn(256, 32, generator=generator, dtype=torch.float64, device="cpu")
    x = x * torch.logspace(-2, 0, 256, dtype=torch.float64, device="cpu")[:, None] * reach
    return _same(gate, x, reference.activation(x, spec))


def activation_name(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `ACTIVATIONS` of a function or module, or None. One with parameters or buffers is never recognised: it can change."""
    if isinstance(act_fn, nn.Module) and (any(True for _ in act_fn.parameters()) or any(True for _ in act_fn.buffers())):
        return None
    near = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
    x = torch.cat([near, torch.tensor([-1000.0, -100.0, -30.0, 30.0, 100.0, 1000.0], dtype=torch.float64, device="cpu")])
    for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        if _same(act_fn, x, reference.activation(x, ExpertSpec(activation=name, gated=False))):
            return name
    return None


def _same(function: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> bool:
    try:
        value = function(x)
    except Exception:  # whatever an unknown function raises on such input, it is not the one that was expected
        return False
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        return False
    return bool(((value.double() - expected).abs() <= SAME_FUNCTION * (1 + expected.abs())).all())

"""Which modules of a model are experts, and by which formula they compute: read off their structure, never off class names.

Stacked experts: the flags that transformers' decorator sets, and 3-D parameters. Module lists: a block with a linear `gate` and
`experts`, a `ModuleList` of alike gated MLPs. Activations and gates are identified by evaluating them in float64 beside
`moe_ext.reference`. Everything that looks like experts and is not supported is listed with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..experts import ExpertSpec
from . import versions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Two functions are the same when they differ by less than this, relative to 1 + |value|, in float64: below the rounding of
#: float32, and above what a constant written with ten digits makes (the tanh forms of GELU differ by 4e-12).
SAME_FUNCTION = 2.0**-34

#: The attribute of a block that holds the forward we gave it.
OUR_FORWARD = "_moe_ext_forward"

#: gate, up and down projection of one expert, by the names that model code uses.
PROJECTION_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class Formula:
    """A spec without functions in it (it can be pickled), and which of the module's own functions belong into it at call time."""

    spec: ExpertSpec
    own_gate: bool = False
    own_post_norm: bool = False

    @property
    def path(self) -> str:
        return "composed" if self.own_gate or self.own_post_norm else "fused"


@dataclass
class Found:
    """One set of experts: its formula, or the reason why it has none here."""

    module: nn.Module
    kind: str  # "stacked", "module list" or "other"
    layout: str
    formula: Formula | None = None
    reason: str | None = None
    projections: tuple[str, str, str] = PROJECTION_NAMES[0]  # of a module list
    name: str = ""


def find(model: nn.Module) -> list[Found]:
    """Every set of experts in `model`, each module once, in the order of `named_modules`."""
    found: list[Found] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        one = _examine(name, module)
        if one is not None:
            one.name = name
            found.append(one)
            inside.update(module.modules())
    return found


def _examine(name: str, module: nn.Module) -> Found | None:
    if versions.is_decorated(module):
        return stacked(module)
    experts = module._modules.get("experts")
    if isinstance(experts, nn.ModuleList) and len(experts):
        return module_list(module)
    return _other(name, module)


# ----------------------------------------------------------------------------------------------------------------------- stacked
def stacked(module: nn.Module) -> Found:
    """Experts behind transformers' decorator. The flags say the layout; shapes are never asked (square weights are ambiguous)."""
    found = Found(module, "stacked", _stacked_layout(module))
    found.reason = _stacked_reason(module)
    if found.reason is None:
        found.formula = stacked_formula(module)
    return found


def _stacked_layout(module: nn.Module) -> str:
    rows = "2I" if module.has_gate else "I"
    words = [f"stacked [E,H,{rows}]" if module.is_transposed else f"stacked [E,{rows},H]"]
    words += ["interleaved"] if module.has_gate and not module.is_concatenated else []
    words += ["bias"] if module.has_bias else []
    return ", ".join(words)


def _stacked_reason(module: nn.Module) -> str | None:
    if versions.registry_of(module) is not versions.experts_registry():
        return f"its class runs through a registry of its own, {type(versions.registry_of(module)).__name__}"
    if versions.experts_implementation(module) in versions.LOCKED_IMPLEMENTATIONS:
        return f"experts_implementation={versions.experts_implementation(module)!r} has rewritten the weights at load time"
    names = {"gate_up_proj" if module.has_gate else "up_proj": 3, "down_proj": 3}
    if module.has_bias:
        names |= {"gate_up_proj_bias" if module.has_gate else "up_proj_bias": 2, "down_proj_bias": 2}
    dtypes = set()
    for name, dim in names.items():
        t = getattr(module, name, None)
        if not isinstance(t, Tensor):
            return f"{name} is missing"
        if t.dim() != dim:
            return f"{name} has shape {tuple(t.shape)}, expected {dim} dimensions"
        dtypes.add(t.dtype)
    return _dtype_reason(dtypes) or replaced_forward(module)


def _dtype_reason(dtypes: set[torch.dtype]) -> str | None:
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    if len(dtypes) > 1:
        return f"its weights have different dtypes: {names}"
    if not dtypes <= set(DTYPES):
        return f"its weights are {names}; supported are float64, float32, bfloat16, float16"
    return None


def own_formula(module: nn.Module) -> Formula:
    """The formula that leaves gate, activation and norm to the module: right for every decorated class, and never fused."""
    spec = ExpertSpec(gated=module.has_gate, transposed=module.is_transposed, interleaved=module.has_gate and not module.is_concatenated)
    return Formula(spec, own_gate=True, own_post_norm=module.has_post_expert_norm)


def stacked_formula(module: nn.Module) -> Formula:
    """The formula with the gate recognised, if it is one of `reference.activation`; else `own_formula`."""
    own = own_formula(module)
    with undisturbed(module):
        if module.has_gate:
            specs = [replace(own.spec, **options) for options in _gate_candidates(module)]
            match = next((spec for spec in specs if _same_gate(module._apply_gate, spec)), None)
        else:
            name = activation_name(module.act_fn)
            match = None if name is None else replace(own.spec, activation=name)
    return own if match is None else replace(own, spec=match, own_gate=False)


def _gate_candidates(module: nn.Module) -> Iterator[dict[str, Any]]:
    act_fn = getattr(module, "act_fn", None)
    name = None if act_fn is None else activation_name(act_fn)
    names = ["silu"] if name is None else [name]
    limits = [None, *_numbers(module, "limit")]
    for limit in limits:
        yield from ({"activation": name, "limit": limit} for name in names)
        yield from ({"activation": "swigluoai", "alpha": alpha, "limit": limit} for alpha in _numbers(module, "alpha"))


def _numbers(module: nn.Module, word: str) -> list[float]:
    """Positive numbers among the attributes whose name ends in `word`: `limit` and `swiglu_limit`, `alpha` and `swiglu_alpha`."""
    values = (value for name, value in vars(module).items() if name.endswith(word))
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]


def _same_gate(gate: Callable[[Tensor], Tensor], spec: ExpertSpec) -> bool:
    # Random signs and magnitudes from well inside to well beyond any clamp, both halves independently.
    generator = torch.Generator("cpu").manual_seed(0)
    reach = 4 * max(1.0, spec.limit or 0.0)
    x = torch.randn(256, 32, generator=generator, dtype=torch.float64, device="cpu")
    x = x * torch.logspace(-2, 0, 256, dtype=torch.float64, device="cpu")[:, None] * reach
    return _same(gate, x, reference.activation(x, spec))


# ------------------------------------------------------------------------------------------------------------------- activations
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


# ------------------------------------------------------------------------------------------------------------------- module list
def module_list(block: nn.Module) -> Found:
    """A block with `experts`, a ModuleList, whose forward is a linear `gate`, softmax, top-k, and those experts.

    The structure only makes this likely; what the block computes is proven on the block itself.
    """
    found = Found(block, "module list", "module list")
    names = next((n for n in PROJECTION_NAMES if all(hasattr(block.experts[0], p) for p in n)), None)
    if names is None:
        found.reason = f"its experts ({type(block.experts[0]).__name__}) have none of {' or '.join('/'.join(n) for n in PROJECTION_NAMES)}"
        return found
    found.projections = names
    found.reason = _router_reason(block) or _experts_reason(block, names) or replaced_forward(block)
    if found.reason is None:
        with undisturbed(block):
            activation, found.reason = _common_activation(block)
        if activation is not None:
            found.formula = Formula(ExpertSpec(activation=activation))
    return found


def _router_reason(block: nn.Module) -> str | None:
    gate = block._modules.get("gate")
    if gate is None:
        return "it has no `gate`"
    if getattr(gate, "out_features", None) != len(block.experts):
        return f"its gate ({type(gate).__name__}) is not a linear layer with one output for each of the {len(block.experts)} experts"
    top_k = getattr(block, "top_k", None)
    if not isinstance(top_k, int) or not 0 < top_k <= len(block.experts):
        return f"its top_k is {top_k!r}"
    others = [name for name, child in block._modules.items() if child is not None and name not in ("gate", "experts")]
    if others or block._parameters:
        return f"it also has {', '.join([*others, *block._parameters])}"
    return None


def _experts_reason(block: nn.Module, names: tuple[str, str, str]) -> str | None:
    first = block.experts[0]
    weights, biases, dtypes = None, None, set()
    for i, expert in enumerate(block.experts):
        linears: list[Any] = [getattr(expert, name, None) for name in names]
        for name, linear in zip(names, linears, strict=True):
            if type(linear) is not nn.Linear:
                return f"experts.{i}.{name} is a {type(linear).__name__}, not a plain nn.Linear"
            if type(linear.weight) not in (Tensor, nn.Parameter):
                return f"experts.{i}.{name}.weight is a {type(linear.weight).__name__}, not a plain tensor"
            dtypes |= {t.dtype for t in linear._parameters.values() if t is not None}
        if set(expert._modules) != set(first._modules) or len(expert._modules) > len(names) + 1:
            return f"experts.{i} consists of {', '.join(expert._modules)}, more or other than an activation and {', '.join(names)}"
        shapes, biased = [linear.weight.shape for linear in linears], [linear.bias is not None for linear in linears]
        weights, biases = weights or shapes, biases or biased
        if shapes != weights or biased != biases:
            return f"experts.{i} differs in shapes or biases from experts.0"
        expert_patch = replaced_forward(expert)
        if expert_patch:
            return f"experts.{i}: {expert_patch}"
    return _dtype_reason(dtypes)


def _common_activation(block: nn.Module) -> tuple[str | None, str | None]:
    """The activation that all experts share, or the reason why there is none."""
    names: dict[int, str | None] = {}
    for expert in block.experts:
        act_fn = getattr(expert, "act_fn", None)
        if act_fn is None:
            return None, f"its experts ({type(expert).__name__}) have no act_fn"
        if id(act_fn) not in names:
            names[id(act_fn)] = activation_name(act_fn)
        if names[id(act_fn)] is None:
            return None, f"act_fn {getattr(act_fn, '__name__', type(act_fn).__name__)} of its experts is not known"
    if len(set(names.values())) > 1:
        return None, f"its experts have different activations: {', '.join(sorted(set(map(str, names.values()))))}"
    return next(iter(names.values())), None


# -------------------------------------------------------------------------------------------------------------------------- other
def _other(name: str, module: nn.Module) -> Found | None:
    """Weights that look like experts, with the reason why they are not supported."""
    last = name.rpartition(".")[2].lower()
    classes = [c.__module__ for c in type(module).__mro__]
    if classes[0].startswith("moe_ext."):
        return Found(module, "other", "moe_ext", reason=f"it is a moe_ext.{type(module).__name__} already")
    if classes[0].startswith("torch.nn.") and not isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return None
    looks = "expert" in last or "expert" in type(module).__name__.lower()
    stacks = [f"{n} {tuple(p.shape)}" for n, p in module._parameters.items() if p is not None and p.dim() == 3]
    if stacks and (looks or "moe" in last or "moe" in type(module).__name__.lower()):
        reason = f"{', '.join(stacks)} are stacked, but not behind transformers' use_experts_implementation, so their layout is unknown"
        return Found(module, "other", "stacked", reason=reason)
    if looks and isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) > 1:
        return Found(module, "other", type(module).__name__, reason="no block that holds it as a ModuleList `experts` beside its `gate`")
    if looks and (any(True for _ in module.parameters(recurse=False)) and "shared" not in last):
        return Found(module, "other", "unknown", reason="its weights are neither stacked in three dimensions nor a ModuleList")
    return None


def replaced_forward(module: nn.Module) -> str | None:
    """The reason not to touch a module whose forward was replaced on the instance: hooks of accelerate, patches of others."""
    forward = module.__dict__.get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    if OUR_FORWARD in module.__dict__:  # ours, or a wrapper put around ours
        return None
    by = getattr(forward, "__qualname__", type(forward).__name__)
    return f"its forward was replaced on the instance (by {by} of {getattr(forward, '__module__', 'unknown origin')})"


# -------------------------------------------------------------------------------------------------------------------------- quiet
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no trace on `module`: no hook of it is called, and its buffers, its training flags and the
    random state are afterwards what they were. Gradients are on, autocast is off.
    """
    modules = list(module.modules())
    hooks = [(m, {name: m.__dict__[name] for name in _HOOKS if m.__dict__.get(name)}) for m in modules]
    hooks = [(m, saved) for m, saved in hooks if saved]
    training = [m.training for m in modules]
    buffers = [(m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None and not b.is_meta]
    devices = {p.device for p in module.parameters() if p.is_cuda}
    kind = next(iter(devices)).type if devices else "cpu"
    with (
        torch.random.fork_rng(devices=sorted(d.index for d in devices), device_type="cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(kind, enabled=False),
    ):
        try:
            for m, saved in hooks:
                m.__dict__.update({name: type(value)() for name, value in saved.items()})
            yield
        finally:
            for m, saved in hooks:
                m.__dict__.update(saved)
            for m, mode in zip(modules, training, strict=True):
                m.__dict__["training"] = mode  # what setting it does, without a look for a submodule of that name
            for m, n, buffer, value in buffers:
                m._buffers[n] = buffer
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)

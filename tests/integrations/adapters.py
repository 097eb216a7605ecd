"""LoRA adapters of PEFT with random numbers in them, experts to put them on, and measurements of what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext.testing import assert_accurate
from tests.helpers.models import routing

peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListedExperts(nn.Module):
    """One module per expert, and the loop over those with tokens: what PEFT's layers are made for."""

    def __init__(self, experts: int = 5, hidden: int = 32, inner: int = 24) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(experts))

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(top_k_index == e)
            if token.numel():
                out = out.index_add(0, token, (expert(x[token]) * top_k_weights[token, k, None]).to(x.dtype))
        return out


def attach(model: nn.Module, name: str = "default", *, cast: bool = True, **options: Any) -> Any:
    """`model` with one LoRA adapter more, with random factors; bfloat16 models get factors in float32 unless `cast` is False."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | options))
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config, autocast_adapter_dtype=cast)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=cast)
    randomise_adapters(model, name)
    return model


def randomise_adapters(model: nn.Module, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lora_" in path and f".{name}." in path:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def activate(model: Any, *names: str) -> Any:
    """Makes these adapters, and no others, active and trainable on every layer that has them."""
    model.base_model.set_adapter(list(names))
    return model


def factors_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable A and B by adapter and projection; those of the experts of one projection go together."""
    found: dict[str, list[Tensor]] = {}
    for path, p in model.named_parameters():
        if p.requires_grad and "lora_" in path:
            found.setdefault(".".join(part for part in path.split(".") if not part.isdigit()), []).append(p)
    return found


Compute = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def outputs_and_gradients(model: nn.Module, compute: Compute, dtype: torch.dtype, tokens: int = 96) -> dict[str, Tensor]:
    """The output and the gradients of the input, the routing weights and all trainable factors; an absent gradient is zero."""
    generator = torch.Generator().manual_seed(5)
    x, direction = (torch.randn(tokens, 32, generator=generator).bfloat16() for _ in range(2))
    index, w = routing(tokens, 5)
    inputs = [x.to(dtype).requires_grad_(), (w.double() if dtype == torch.float64 else w).requires_grad_()]
    factors = factors_of(model)
    out = compute(model, inputs[0], index, inputs[1])
    wanted = [*inputs, *(p for found in factors.values() for p in found)]
    grads = iter(torch.autograd.grad(out, wanted, direction.to(dtype), allow_unused=True))
    result = {"output": out.detach(), "gradient of x": next(grads), "gradient of the routing weights": next(grads)}
    for name, found in factors.items():
        of_found = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(found, grads, strict=False)]
        result[f"gradient of {name}"] = torch.cat(of_found)
    return result


def exact_copy(model: nn.Module) -> nn.Module:
    """A float64 copy; buffers and parameters of all adapters included."""
    return copy.deepcopy(model).double()


def assert_all_accurate(new: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert new.keys() == plain.keys() == truth.keys()
    for name, exact in truth.items():
        assert_accurate(new[name], plain[name], exact, name)


class Recorder(TorchDispatchMode):
    """Notes the op and the shape of every tensor that is computed while it is active, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [(str(func), t.shape) for t in _tensors(out)]
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)

"""Tiny random models with the structure of real ones, under transformers 5 and 4.57 alike, and measurements on them."""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.testing import assert_accurate, relative_error

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'moe-ext[hf]')")


def transformers_major() -> int:
    return int(transformers.__version__.split(".")[0])


needs_tf4 = pytest.mark.skipif(transformers_major() != 4, reason="needs transformers 4 (4.57.6)")
needs_tf5 = pytest.mark.skipif(transformers_major() < 5, reason="needs transformers 5")

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

CAUSAL_LM: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 48, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "intermediate_size": 40}),
    "olmoe": ("Olmoe", {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "intermediate_size": 32, "layer_types": ["full_attention"] * 2, "swiglu_limit": 1.0},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 48, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2,
        },
    ),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}),
    "llama": ("Llama", {"intermediate_size": 48}),
}  # fmt: skip

#: Families whose experts are stacked under transformers 5 and a ModuleList under transformers 4.
BOTH = ("qwen3_moe", "mixtral", "olmoe")


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A language model of `family`; weights large enough that every nonlinearity is used."""
    prefix, options = CAUSAL_LM[family]
    options = {**COMMON, **options, **overrides}
    if family == "deepseek_v3":
        del options["head_dim"]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**options)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    randomise(model)
    return model.to(dtype)


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def tokens(length: int = 12, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


class Holder(nn.Module):
    """A model that is nothing but one module: what an architecture of one's own looks like."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts_of_mine = experts


EXPERTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", {"num_experts": 5, "moe_intermediate_size": 24}),
    "mixtral": ("mixtral", "MixtralExperts", "MixtralConfig", {"num_local_experts": 5, "intermediate_size": 24}),
    "olmoe": ("olmoe", "OlmoeExperts", "OlmoeConfig", {"num_experts": 5, "intermediate_size": 24}),
    "gpt_oss": ("gpt_oss", "GptOssExperts", "GptOssConfig", {"num_local_experts": 5, "intermediate_size": 24, "swiglu_limit": 1.0}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Experts", "DeepseekV3Config", {"n_routed_experts": 5, "moe_intermediate_size": 24}),
    "deepseek_v4": (
        "deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", {"n_routed_experts": 5, "moe_intermediate_size": 24, "swiglu_limit": 1.0},
    ),
    "nemotron_h": ("nemotron_h", "NemotronHExperts", "NemotronHConfig", {"n_routed_experts": 5, "moe_intermediate_size": 24}),
    "gemma4": ("gemma4", "Gemma4TextExperts", "Gemma4TextConfig", {"num_experts": 5, "moe_intermediate_size": 24}),
    "aria": ("aria", "AriaExperts", "AriaTextConfig", {"moe_num_experts": 5, "intermediate_size": 24}),
    "beam": ("beam", "BeamExperts", "BeamConfig", {"num_experts": 5, "moe_intermediate_size": 24}),
    "muse_spark": (
        "muse_spark", "MuseSparkExperts", "MuseSparkTextConfig",
        {"num_local_experts": 5, "moe_intermediate_size": 24, "moe_hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
}  # fmt: skip


def build_experts(family: str, dtype: torch.dtype = torch.float32, implementation: str = "eager", **overrides: Any) -> nn.Module:
    """The experts of `family` by themselves (transformers 5), hidden size 32."""
    package, experts_class, config_class, options = EXPERTS[family]
    config = getattr(transformers, config_class)(**{"hidden_size": 32, **options, **overrides})
    config._experts_implementation = implementation
    module = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), experts_class)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module.to(dtype)


def routing(tokens: int, experts: int, top_k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """top_k_index `[T,K]` with distinct experts per token, top_k_weights `[T,K]` float32."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    return index, torch.rand(tokens, top_k, generator=generator)


def logits_and_gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and the gradients of a fixed function of them; an absent gradient is zero.

    Parameters whose names differ in numbers only (layers, experts) are one entry: an expert with two tokens has too few numbers for
    its error to be a typical one.
    """
    model.zero_grad()
    logits = model(input_ids=ids).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    (logits * direction).sum().backward()
    grads: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        grads.setdefault(re.sub(r"\d+", "*", name), []).append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
    return {"logits": logits.detach(), **{name: torch.cat(found) for name, found in grads.items()}}


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy that runs the model's own code: the truth for a whole float32 model."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that `enable` works on: experts under transformers 5, whole blocks under transformers 4."""
    if transformers_major() >= 5:
        return [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "down_proj")]
    return [m for m in model.modules() if isinstance(m._modules.get("experts"), nn.ModuleList)]


def enable_within_the_error_rule(model: nn.Module, ids: torch.Tensor) -> tuple[moe_ext.EnableReport, dict[str, torch.Tensor]]:
    """Enables every block of `model`; its logits and gradients must obey the error rule. Returns the report, and what they were before."""
    plain, truth = logits_and_gradients(model, ids), logits_and_gradients(in_float64(model), ids)
    report = moe_ext.enable(model, strict=True)
    new = logits_and_gradients(model, ids)
    for name in truth:
        assert_accurate(new[name], plain[name], truth[name], name)
    return report, plain


def assert_as(out: torch.Tensor, plain: nn.Module, *args: torch.Tensor) -> None:
    """`out` is what the module computes, by the error rule."""
    exact = copy.deepcopy(plain).double()(*(a.double() if a.is_floating_point() else a for a in args))
    assert_accurate(out, plain(*args), exact)


def is_another(out: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they differ by more than rounding."""
    return relative_error(out, other) > torch.finfo(out.dtype).eps ** 0.5

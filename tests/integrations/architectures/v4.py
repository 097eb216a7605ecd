"""The architectures of transformers 4.57 as tiny random models.

Their options are in two tables: SMALL, which every config gets (each takes what it knows), and OPTIONS, what an architecture has on its
own. Wherever a default would leave code of a block unused, the option differs from it: jitter, groups, scaling factors, biases on the
experts, capacities that overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.doge.modeling_doge import DogeCDMoE
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerTextConfig, Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerModel, Qwen3OmniMoeThinkerTextModel

from tests.integrations.architectures import Architecture, ids

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "max_position_embeddings": 64, "use_cache": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

#: DeepSeek's attention.
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip

#: DeepSeek-V3's routing: one of two groups of four experts.
GROUPED: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 0,
}  # fmt: skip

GRANITE: dict[str, Any] = {
    "num_local_experts": 8, "embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.3,
}  # fmt: skip

#: Positions of time, height and width.
ROPE_3D: dict[str, Any] = {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}

#: Half of the layers are linear attention or a state space, the other half is attention.
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}

LLAMA4: dict[str, Any] = {"num_local_experts": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
QWEN3_VL: dict[str, Any] = {"num_experts": 8, **ROPE_3D}

#: By the name that transformers has for an architecture.
OPTIONS: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2},
    "dbrx": {
        "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "attn_config": {"kv_n_heads": 1},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "moe_jitter_eps": 0.1},
    },
    "deepseek_v2": {**LATENT, **GROUPED, "n_group": 4, "topk_group": 2, "mlp_bias": True},
    "deepseek_v3": {**LATENT, **GROUPED, "first_k_dense_replace": 1},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": GROUPED,
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0, "moe_norm_min": 0.5},
    "flex_olmo": {"num_experts": 8},
    "glm4_moe": GROUPED,
    "glm4v_moe_text": {**GROUPED, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "gpt_oss": {"num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gptsan-japanese": {
        "d_model": 32, "d_ff": 24, "d_ext": 48, "d_spout": 0, "num_heads": 2, "num_switch_layers": 2, "num_ext_layers": 1,
        "num_experts": 4, "expert_capacity": 3, "router_bias": True, "router_jitter_noise": 0.1, "num_hidden_layers": 3,
    },
    "granitemoe": GRANITE,
    "granitemoehybrid": {
        **GRANITE, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_chunk_size": 8,
    },
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "jamba": {
        "num_experts": 6, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
    "jetmoe": {"num_local_experts": 8, "kv_channels": 16},
    "llama4": {
        "text_config": {**SMALL, **LLAMA4, "num_experts_per_tok": 1},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
            "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        },
    },
    "llama4_text": LLAMA4,
    "longcat_flash": {
        **LATENT, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "n_routed_experts": 6,
        "zero_expert_num": 2, "moe_topk": 3, "routed_scaling_factor": 1.5, "router_bias": True,
    },
    "minimax": {**LINEAR, "num_local_experts": 6, "router_jitter_noise": 0.1, "block_size": 8},
    "mixtral": {"num_local_experts": 6, "router_jitter_noise": 0.1},
    "nllb-moe": {  # wide, because near zero the derivative of relu is what the rounding makes it
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0, "moe_token_dropout": 0.0, "num_experts": 4,
        "expert_capacity": 12, "moe_eval_capacity_token_fraction": 0.5, "router_bias": True, "pad_token_id": 1,
    },
    "olmoe": {"num_experts": 8},
    # router_jitter_noise is a bound on the scores that compete here, input_jitter_noise is what it is called in others.
    "phimoe": {"num_local_experts": 6, "input_jitter_noise": 0.1, "router_jitter_noise": 0.4},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8},
    "qwen3_next": {
        **LINEAR, "num_experts": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "qwen3_vl_moe": {
        "text_config": {**SMALL, **QWEN3_VL},
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    },
    "qwen3_vl_moe_text": QWEN3_VL,
    # Its attention does not scale its scores: with more than a few numbers in a key they are too far apart to compute in bfloat16.
    "switch_transformers": {
        "d_model": 32, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 3, "router_bias": True, "router_jitter_noise": 0.1,
        "dropout_rate": 0.0,
    },
    "vitpose_backbone": {"image_size": [32, 32], "mlp_ratio": 2, "num_experts": 3, "part_features": 8},
}  # fmt: skip


def entry(
    name: str, architecture: str = "", auto: Any = AutoModelForCausalLM, inputs: Callable[[], dict[str, Any]] = ids, blocks: int = 2,
    path: str = "fused", **changes: Any,
) -> Architecture:  # fmt: skip
    """A model that transformers can find by its architecture, `name` where none is given; `changes` to its options."""
    kind = architecture or name
    return Architecture(name, lambda: auto.from_config(AutoConfig.for_model(kind, **SMALL | OPTIONS[kind] | changes)), inputs, blocks, path)


def masked_ids() -> dict[str, Any]:
    """With a mask that masks nothing, and no integers: some models take its dtype for their own."""
    tokens = ids()
    return {**tokens, "attention_mask": torch.ones(tokens["input_ids"].shape)}


def embeddings() -> dict[str, Any]:
    return {"inputs_embeds": torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))}


def translation() -> dict[str, Any]:
    """Token ids for an encoder and a decoder, none of them special."""
    source, target = ids(length=24)["input_ids"].clamp(min=3).chunk(2, dim=1)
    return {"input_ids": source, "decoder_input_ids": target}


def padded_translation() -> dict[str, Any]:
    inputs = translation()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, -3:] = 0
    return {**inputs, "attention_mask": mask}


def images() -> dict[str, Any]:
    """Two images of different datasets."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "dataset_index": torch.tensor([0, 2])}


class Retrieval(nn.Module):
    """Doge's experts between an embedding and a head: Doge's own decoder layer fails on the tuple that they return."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoConfig.for_model("doge", **SMALL | OPTIONS["doge"])
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mlp = DogeCDMoE(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states, _ = self.mlp(self.embed(input_ids))
        return self.head(hidden_states)


ARCHITECTURES: list[Architecture] = [
    # A list of experts and a linear gate: softmax, top-k; some have shared experts.
    entry("ernie4_5_moe", use_bias=True),
    entry("ernie4_5_moe_no_shared", "ernie4_5_moe", moe_num_shared_experts=0),
    entry("flex_olmo", norm_topk_prob=False),
    entry("flex_olmo_norm", "flex_olmo", norm_topk_prob=True),
    entry("hunyuan_v1_moe"),
    entry("jamba"),
    entry("minimax"),
    entry("mixtral"),
    entry("olmoe", norm_topk_prob=False),
    entry("olmoe_norm", "olmoe", norm_topk_prob=True),
    entry("phimoe"),
    entry("qwen2_moe", norm_topk_prob=False),
    entry("qwen3_moe", norm_topk_prob=False),
    entry("qwen3_moe_norm", "qwen3_moe", norm_topk_prob=True),
    entry("qwen3_next", norm_topk_prob=True),
    Architecture(
        "qwen3_omni_moe_thinker_text",
        lambda: Qwen3OmniMoeThinkerTextModel(Qwen3OmniMoeTextConfig(**SMALL, **QWEN3_VL, norm_topk_prob=True)),
        ids,
        blocks=2,
    ),
    Architecture(
        "qwen3_omni_moe_talker_text",
        lambda: Qwen3OmniMoeTalkerModel(Qwen3OmniMoeTalkerTextConfig(**SMALL, **QWEN3_VL, shared_expert_intermediate_size=16)),
        embeddings,
        blocks=2,
    ),
    # A list of experts and a router that returns ids and weights.
    entry("deepseek_v2"),
    entry("deepseek_v2_group", "deepseek_v2", topk_method="group_limited_greedy", mlp_bias=False),
    entry("deepseek_v3", blocks=1),
    entry("dots1"),
    entry("glm4_moe"),
    entry("glm4v_moe_text", auto=AutoModel, inputs=masked_ids),
    entry("longcat_flash"),
    # Stacked experts.
    entry("aria_text"),
    entry("dbrx"),
    entry("gpt_oss"),
    entry("granitemoe", path="composed"),
    entry("granitemoehybrid", path="composed"),
    entry("granitemoeshared", path="composed"),
    entry("jetmoe", blocks=4, path="composed"),  # per layer the MLP, and the projections of the attention
    entry("llama4", auto=AutoModelForImageTextToText),
    entry("llama4_text", num_experts_per_tok=1),
    entry("llama4_text_top2", "llama4_text"),
    entry("qwen3_vl_moe", auto=AutoModelForImageTextToText),
    entry("qwen3_vl_moe_text", auto=AutoModel),
    # Experts that take a limited number of tokens.
    Architecture(
        "gptsan_japanese",
        lambda: transformers.GPTSanJapaneseForConditionalGeneration(
            AutoConfig.for_model("gptsan-japanese", **SMALL | OPTIONS["gptsan-japanese"])
        ),
        masked_ids,
        blocks=2,
    ),
    entry("nllb_moe", "nllb-moe", AutoModelForSeq2SeqLM, padded_translation, blocks=4),
    entry("switch_transformers", auto=AutoModelForSeq2SeqLM, inputs=translation),
    # Experts that are not MLPs that tokens are sent to.
    Architecture("doge", Retrieval, ids, blocks=1, path="skipped", reason="none of its", output=lambda out: out),
    Architecture(
        "vitpose_backbone",
        lambda: AutoBackbone.from_config(AutoConfig.for_model("vitpose_backbone", **SMALL | OPTIONS["vitpose_backbone"])),
        images,
        blocks=2,
        path="skipped",
        reason="its experts (Linear)",
        output=lambda out: out.feature_maps[-1],
    ),
]

"""The architectures of transformers 5 as tiny random models.

SMALL has small values for all options that are sizes; an entry adds what its config needs besides, and switches on what a default
leaves unused: jitter, groups, clamps that act, shared experts, capacities that overflow, a budget of attention that leaves tokens out.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.architectures import Architecture, ids, main_output

#: Options by the names that configs have for them; each config takes those it knows.
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 24, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "max_position_embeddings": 64,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 2, "topk_group": 1,
    "mlp_layer_types": ["sparse", "sparse"], "first_k_dense_replace": 1, "swiglu_limit": 0.25, "router_jitter_noise": 0.1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_head_dim": 8, "linear_num_heads": 2, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
    # A norm makes an error of any size of a vector that happens to be short; its eps is the bound of that.
    "rms_norm_eps": 0.01, "layer_norm_eps": 0.01, "layer_norm_epsilon": 0.01, "norm_eps": 0.01, "post_norm_eps": 0.01,
    "use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip

#: Linear attention norms a state that is the smaller the fewer tokens there were: it comes first, where it sees no experts' rounding.
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
#: A clamp has kinks, where the derivative is what rounding makes it. There is one layer of such experts, so that all runs have the same
#: input, and its limit is small: near a small number a value's own rounding moves it less than the errors that all runs share.
CLAMPED: dict[str, Any] = {"blocks": 1, "mlp_layer_types": ["dense", "sparse"]}
GRANITE = {"embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.3}
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "ssm_state_size": 8, "mamba_num_heads": 4,
    "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
GEMMA = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 32, "global_head_dim": 16}
#: Positions of time, height and width.
ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GEMMA_VISION = VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
}  # fmt: skip


def small(package: str, config: str, **options: Any) -> Any:
    """A small config of a class of a transformers package."""
    config_class = getattr(importlib.import_module(f"transformers.models.{package}.configuration_{package}"), config)
    known = {f.name for f in dataclasses.fields(config_class)}
    return config_class(**({name: value for name, value in SMALL.items() if name in known} | options))


def make(package: str, config: str, model: str, options: dict[str, Any]) -> nn.Module:
    """An instance of a model class of a transformers package. An option that is a function is called for its value: parts of a
    config are made when the model is.
    """
    model_class = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), model)
    return model_class(small(package, config, **{name: value() if callable(value) else value for name, value in options.items()}))


def entry(
    name: str, config: str, model: str, blocks: int = 2, path: str = "fused", package: str = "", reason: str = "",
    inputs: Callable[[], dict[str, Any]] = ids, output: Callable[[Any], Tensor] = main_output, **options: Any,
) -> Architecture:  # fmt: skip
    """A model class and the class of its config; `package` where it is not called like the architecture."""
    return Architecture(name, lambda: make(package or name, config, model, options), inputs, blocks, path, reason, output)


def lm(name: str, prefix: str, **options: Any) -> Architecture:
    """A causal language model."""
    return entry(name, f"{prefix}Config", f"{prefix}ForCausalLM", **options)


def text(name: str, prefix: str, **options: Any) -> Architecture:
    """The text model of a multimodal one."""
    return entry(name, f"{prefix}TextConfig", f"{prefix}TextModel", **({"package": name.removesuffix("_text")} | options))


def deepseek_v4(mlp: str, attention: str) -> nn.Module:
    """A layer of DeepSeek-V4. The table of experts by token, which a checkpoint brings, here has any two that are not the same."""
    config = small(
        "deepseek_v4", "DeepseekV4Config", num_hidden_layers=1, layer_types=[attention], mlp_layer_types=[mlp], o_groups=2,
        o_lora_rank=8, hc_mult=2, compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    )  # fmt: skip
    model = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4").DeepseekV4ForCausalLM(config)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), 8, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, : table.shape[1]])
    return model


# ----------------------------------------------------------------------------------------------------------------- inputs and outputs
def embeddings() -> dict[str, Any]:
    return {"inputs_embeds": torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))}


def words_and_patches() -> dict[str, Any]:
    return ids() | {"moe_mm_token_type_ids": torch.tensor([[0] * 6 + [1] * 6] * 2)}


def both_sides() -> dict[str, Any]:
    """Tokens for an encoder and a decoder, none of them special."""
    tokens = ids()["input_ids"].clamp(min=3)
    return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}


def patches() -> dict[str, Any]:
    """Two images of 2x6 patches of 4x4 pixels, all in one row."""
    pixels = torch.randn(24, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 2, 6], [1, 2, 6]])}


def images() -> dict[str, Any]:
    """Two images of different datasets."""
    pixels = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "dataset_index": torch.tensor([0, 1])}


def pooled(out: Any) -> Tensor:
    return out.pooler_output


def feature_map(out: Any) -> Tensor:
    return out.feature_maps[-1]


ARCHITECTURES: list[Architecture] = [
    lm("afmoe", "Afmoe", num_dense_layers=0),
    lm("aria_text", "AriaText", package="aria"),
    lm("axk1", "AXK1"),
    lm("axk2", "AXK2"),
    lm("axk2_nogroup", "AXK2", package="axk2", n_group=None, topk_group=None),
    lm("bailing_hybrid", "BailingHybrid", **LINEAR),
    lm("beam", "Beam", path="composed"),
    lm("cohere2_moe", "Cohere2Moe", num_shared_experts=1),
    lm("cohere2_moe_sigmoid", "Cohere2Moe", package="cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=False),
    lm(
        "dbrx", "Dbrx", d_model=32, n_heads=2, n_layers=2, max_seq_len=64, attn_config={"rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "moe_jitter_eps": 0.1},
    ),
    text("deepseek_ocr2_text", "DeepseekOcr2"),
    lm("deepseek_v2", "DeepseekV2", n_group=None, topk_group=None, first_k_dense_replace=0),
    lm("deepseek_v2_group", "DeepseekV2", blocks=1, package="deepseek_v2", topk_method="group_limited_greedy"),
    lm("deepseek_v3", "DeepseekV3", blocks=1),
    lm("deepseek_v32", "DeepseekV32"),
    Architecture("deepseek_v4", partial(deepseek_v4, "moe", "compressed_sparse_attention"), ids, blocks=1),
    Architecture("deepseek_v4_hash", partial(deepseek_v4, "hash_moe", "heavily_compressed_attention"), ids, blocks=1),
    entry(
        "diffusion_gemma", "DiffusionGemmaConfig", "DiffusionGemmaModel", blocks=4, canvas_length=8, vision_config=GEMMA_VISION,
        text_config=partial(small, "diffusion_gemma", "DiffusionGemmaTextConfig", **GEMMA), inputs=both_sides,
    ),
    entry("diffusion_gemma_text", "DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel", package="diffusion_gemma", **GEMMA),
    lm("doge", "Doge", path="skipped", is_moe=True, num_experts=16, reason="none of its"),
    lm("dots1", "Dots1", blocks=1, n_shared_experts=1),
    text("dots3_note_text", "Dots3Note"),
    entry(
        "dots3_note_vision", "Dots3NoteVisionConfig", "Dots3NoteVisionModel", package="dots3_note", patch_size=4, adapter_in_dim=32,
        adapter_out_dim=32, inputs=patches, output=pooled,
    ),
    lm("ernie4_5_moe", "Ernie4_5_Moe", blocks=1),
    text(  # each layer has experts for words and others for patches
        "ernie4_5_vl_moe_text", "Ernie4_5_VLMoe", blocks=4, moe_num_experts=4, moe_intermediate_size=[24, 16],
        rope_parameters=ROPE_3D | {"mrope_section": [2, 2, 4]}, inputs=words_and_patches,
    ),
    lm("exaone_moe", "ExaoneMoe"),
    lm("flex_olmo", "FlexOlmo"),
    lm("flex_olmo_norm", "FlexOlmo", package="flex_olmo", norm_topk_prob=True),
    lm("flint", "Flint", mlp_only_layers=[]),
    entry(
        "gemma4", "Gemma4Config", "Gemma4ForConditionalGeneration", vision_config=GEMMA_VISION,
        text_config=partial(small, "gemma4", "Gemma4TextConfig", pad_token_id=0, enable_moe_block=True, **GEMMA),
    ),
    entry("gemma4_text", "Gemma4TextConfig", "Gemma4ForCausalLM", package="gemma4", enable_moe_block=True, **GEMMA),
    lm("glm4_moe", "Glm4Moe", blocks=1),
    lm("glm4_moe_lite", "Glm4MoeLite"),
    text("glm4v_moe_text", "Glm4vMoe", blocks=1, rope_parameters=ROPE_3D | {"partial_rotary_factor": 1.0}),
    text("glm5_next_text", "Glm5Next", qk_rope_head_dim=0, head_dim=0, index_kpool=2, hc_mult=2, **LINEAR, **CLAMPED),
    lm("glm_moe_dsa", "GlmMoeDsa"),
    lm("gpt_oss", "GptOss", blocks=1, num_hidden_layers=1),
    lm("granitemoe", "GraniteMoe", **GRANITE),
    lm("granitemoe_swa", "GraniteMoeSWA", **GRANITE),
    lm(
        "granitemoehybrid", "GraniteMoeHybrid", mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=16, shared_intermediate_size=16,
        **GRANITE, **LINEAR,
    ),
    lm("granitemoeshared", "GraniteMoeShared", shared_intermediate_size=16, **GRANITE),
    lm("hunyuan_v1_moe", "HunYuanMoEV1"),
    lm("hy_v3", "HYV3"),
    lm("hy_v4", "HYV4", **CLAMPED),
    text("inkling_text", "Inkling"),
    text("inkling2_text", "Inkling2", path="composed"),
    lm("jamba", "Jamba", blocks=1),
    lm("jetmoe", "JetMoe", blocks=4, path="composed", kv_channels=16),  # per layer the MLP, and the projections of the attention
    entry(
        "kimi_k25", "Kimi_K25Config", "Kimi_K25ForConditionalGeneration", blocks=1, projection_hidden_size=32, vision_config=VISION,
        text_config=partial(small, "deepseek_v3", "DeepseekV3Config"),
    ),
    lm("kimi_linear", "KimiLinear", **LINEAR),
    lm("kolibri1", "Kolibri1"),
    lm("laguna", "Laguna", moe_router_logit_softcapping=2.0),
    lm("lfm2_moe", "Lfm2Moe", num_dense_layers=0, layer_types=["conv", "full_attention"]),
    entry(
        "llama4", "Llama4Config", "Llama4ForConditionalGeneration",
        vision_config=VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        text_config=partial(small, "llama4", "Llama4TextConfig", num_experts_per_tok=1),
    ),
    text("llama4_text", "Llama4", num_experts_per_tok=1),
    text("llama4_text_top2", "Llama4", package="llama4"),
    lm("longcat_flash", "LongcatFlash", num_layers=2, head_dim=8, ffn_hidden_size=24, expert_ffn_hidden_size=24, zero_expert_num=4),
    lm("mellum", "Mellum"),
    lm("mimo_v2_flash", "MiMoV2Flash", num_key_value_heads=1),
    lm("minimax", "MiniMax", **LINEAR),
    lm("minimax_m2", "MiniMaxM2"),
    text("minimax_m3_vl_text", "MiniMaxM3VL", **CLAMPED),
    lm("mistral4", "Mistral4", blocks=1),
    text("mistral_large4_text", "MistralLarge4"),
    lm("mixtral", "Mixtral"),
    text("muse_spark_text", "MuseSpark", path="composed", moe_hidden_size=48, qk_scale_factor=1.0),
    lm("nemotron_h", "NemotronH", **NEMOTRON),
    lm("nemotron_h_latent", "NemotronH", package="nemotron_h", moe_latent_size=16, **NEMOTRON),
    entry(
        "nemotron_h_omni", "NemotronH_Omni_Reasoning_V3_Config", "NemotronH_Omni_Reasoning_V3", projector_hidden_size=32,
        vision_config=VISION | {"image_size": 16, "max_img_size": 32, "patch_size": 4, "video_temporal_patch_size": 2},
        vision_hidden_size=32, text_config=partial(small, "nemotron_h", "NemotronHConfig", **NEMOTRON),
    ),
    # Behind sparse layers, relu's kink makes of the rounding of experts what it likes: in this and in Switch there is one, the last.
    entry(
        "nllb_moe", "NllbMoeConfig", "NllbMoeForConditionalGeneration", blocks=1, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, encoder_sparse_step=0,
        decoder_sparse_step=1, dropout=0.0, attention_dropout=0.0, moe_token_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        num_experts=4, expert_capacity=10, router_bias=True, pad_token_id=1, inputs=both_sides,
    ),
    lm("olmoe", "Olmoe"),
    entry("openai_privacy_filter", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", blocks=1, num_hidden_layers=1),
    lm("phimoe", "Phimoe", input_jitter_noise=0.1),
    lm("qwen2_moe", "Qwen2Moe"),
    text("qwen3_5_moe_text", "Qwen3_5Moe", **LINEAR),
    lm("qwen3_moe", "Qwen3Moe"),
    lm("qwen3_moe_norm", "Qwen3Moe", package="qwen3_moe", norm_topk_prob=True),
    lm("qwen3_next", "Qwen3Next", **LINEAR),
    entry("qwen3_omni_moe_thinker_text", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", package="qwen3_omni_moe"),
    entry(
        "qwen3_omni_moe_talker_text", "Qwen3OmniMoeTalkerTextConfig", "Qwen3OmniMoeTalkerModel", package="qwen3_omni_moe",
        shared_expert_intermediate_size=16, inputs=embeddings,
    ),
    entry(
        "qwen3_vl_moe", "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", vision_config=QWEN_VISION,
        text_config=partial(small, "qwen3_vl_moe", "Qwen3VLMoeTextConfig", rope_parameters=ROPE_3D),
    ),
    text("qwen3_vl_moe_text", "Qwen3VLMoe"),
    text("qwen4_exp_text", "Qwen4Exp", hc_count=2, hc_lowrank=8, **LINEAR),
    lm("solar_open", "SolarOpen"),
    text("step3p7_text", "Step3p7", path="composed", pad_token_id=0, share_expert_dim=16, swiglu_limits=[0.25, 0.25], **CLAMPED),
    # Its attention does not scale its scores: with more than a few numbers in a key they are too far apart to compute in bfloat16.
    entry(
        "switch_transformers", "SwitchTransformersConfig", "SwitchTransformersEncoderModel", blocks=1, d_model=32, d_kv=4, d_ff=24,
        num_heads=2, num_layers=2, num_sparse_encoder_layers=1, dropout_rate=0.0, num_experts=4, expert_capacity=4, router_bias=True,
    ),
    text("unlimited_ocr_text", "UnlimitedOcr"),
    entry(
        "vitpose_backbone", "VitPoseBackboneConfig", "VitPoseBackbone", path="skipped", image_size=[32, 24], patch_size=[8, 8],
        num_experts=4, part_features=8, reason="its experts (Linear)", inputs=images, output=feature_map,
    ),
    lm("zaya", "Zaya", num_experts=4, num_experts_per_tok=1, router_hidden_size=16),
]  # fmt: skip
# New in 5.24. Move them into the list when 5.24 is the release that is tested.
ARCHITECTURES += [
    architecture
    for package, architecture in {
        "hy_v4_vl": text("hy_v4_vl_text", "HYV4VL", rope_parameters=ROPE_3D | {"mrope_section": [1, 1, 2]}, **CLAMPED),
        "lara_mini": lm("lara_mini", "LaraMini", **LINEAR),
    }.items()
    if importlib.util.find_spec(f"transformers.models.{package}") is not None
]

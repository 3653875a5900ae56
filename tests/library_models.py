"""Small models of architectures that Transformers runs: configurations with every trait that chunks could break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 512, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = _GROUPS | {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_INDEX = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 16}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_WINDOW = {"sliding_window": 32}
_MIXED = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
_VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_LLAMA4 = _HEAD | {"num_local_experts": 4, "attention_chunk_size": 64, "intermediate_size_mlp": 64}

# Fields of the text decoder, and of a wrapper around it.
TRAITS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 37},
    "MixtralForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3MoeForCausalLM": _EXPERTS | _HEAD,
    "GptOssForCausalLM": _EXPERTS | _HEAD | _MIXED,
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "DeepseekV32ForCausalLM": _LATENT | _INDEX,
    "GlmMoeDsaForCausalLM": _LATENT | _INDEX,
    "Gemma2ForCausalLM": _HEAD | _WINDOW | {"query_pre_attn_scalar": 16},
    "Gemma3ForCausalLM": _HEAD | _WINDOW,
    "Gemma3ForConditionalGeneration": _HEAD | _WINDOW | {"wrapper": {"vision_config": _VISION}},
    "Gemma4ForCausalLM": _HEAD
    | _MIXED
    | {
        "global_head_dim": 32, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 32, "num_kv_shared_layers": 0, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "Llama4ForCausalLM": _LLAMA4,
    "Llama4ForConditionalGeneration": _LLAMA4
    | {"wrapper": {"vision_config": _VISION | {"vision_output_dim": 32, "projector_input_dim": 32,
                                               "projector_output_dim": 32}}},
    "Glm4ForCausalLM": _HEAD,
    "Glm4MoeForCausalLM": _GROUPS | _HEAD,
    "Glm4MoeLiteForCausalLM": _LATENT,
    "GraniteForCausalLM": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "GraniteMoeHybridForCausalLM": _EXPERTS
    | _MAMBA
    | {"shared_intermediate_size": 32, "mamba_expand": 2, "layer_types": ["mamba", "attention"] * 2},
    "SeedOssForCausalLM": _HEAD,
    "Exaone4ForCausalLM": _MIXED,
    "SmolLM3ForCausalLM": {},
    "Phi3ForCausalLM": {"sliding_window": 100},
    "Olmo3ForCausalLM": _MIXED,
    "Cohere2ForCausalLM": _MIXED,
    "MiniMaxM2ForCausalLM": _EXPERTS | _HEAD,
    "Ernie4_5_MoeForCausalLM": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32,
                                "moe_num_shared_experts": 1},
    "HunYuanMoEV1ForCausalLM": _HEAD | {"num_experts": 8, "moe_topk": 2},
    "Qwen3NextForCausalLM": _EXPERTS | _LINEAR | _HEAD | {"shared_expert_intermediate_size": 32},
    "Qwen3_5MoeForCausalLM": _EXPERTS | _LINEAR | _HEAD | {"shared_expert_intermediate_size": 32},
    "Qwen3VLForConditionalGeneration": _HEAD
    | {
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        "wrapper": {
            "vision_config": {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
                              "out_hidden_size": 64, "deepstack_visual_indexes": [0]}
        },
    },
    "NemotronHForCausalLM": _GROUPS
    | _HEAD
    | {"hybrid_override_pattern": "M*-E", "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
       "n_groups": 2, "moe_shared_expert_intermediate_size": 32, "n_group": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "FalconH1ForCausalLM": _HEAD | _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "Ministral3ForCausalLM": _HEAD,
}  # fmt: skip


def make_model(architecture: str, **sizes: Any) -> Any:
    """A model with random weights in float32; `sizes` replaces fields of its text decoder."""
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    traits = dict(TRAITS[architecture])
    wrapper = traits.pop("wrapper", None)
    text = _BASE | traits | sizes
    config = kind.config_class(**text) if wrapper is None else kind.config_class(text_config=text, **wrapper)
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):  # made as zeros and ones, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_model(folder: Path, architecture: str, **sizes: Any) -> Path:
    """The same as a checkpoint of several files, under the names that published ones have."""
    make_model(architecture, **sizes).save_pretrained(folder, max_shard_size="300KB")
    return folder

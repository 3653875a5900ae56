"""Architectures whose tokens through Transformers are held equal to its own by tests, chunk by chunk, stage by stage.

Others of its decoders are run the same way; what is not known of them is whether chunks leave their tokens as they are.
"""

from __future__ import annotations

VERIFIED: tuple[str, ...] = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Llama4ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "SeedOssForCausalLM",
    "Exaone4ForCausalLM",
    "SmolLM3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo3ForCausalLM",
    "Cohere2ForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "NemotronHForCausalLM",
    "Lfm2ForCausalLM",
    "FalconH1ForCausalLM",
    "Ministral3ForCausalLM",
    "Llama4ForConditionalGeneration",
)

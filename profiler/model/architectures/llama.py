"""Llama's layer and those that differ from it by biases, windows, fusing or rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from profiler.model.architectures.architecture import FULL, SLIDING, Architecture, Config
from profiler.model.architectures.dense import (
    all_sliding,
    dense_layer,
    fused,
    head_norms,
    number,
    partly_turned,
    scaled_blocks,
    scaled_scores,
    unturned,
    windowed,
)
from profiler.model.fields import KernelsMissingError
from profiler.model.rope import SUPPORTED_TYPES, Rotation, rope_type
from profiler.model.spec import LayerSpec
from profiler.model.tensors import Cut, Dim, NormSpec


def _llama(config: Config, kind: str) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
    if kind != FULL:
        raise KernelsMissingError("layer_types", kind, f"only {FULL} is supported in this architecture")
    return layer


def _mistral(config: Config, kind: str) -> LayerSpec:
    return windowed(dense_layer(config), config, kind)


def _qwen2(config: Config, kind: str) -> LayerSpec:
    return windowed(dense_layer(config, qkv_bias=True), config, kind)


def _qwen3(config: Config, kind: str) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    return windowed(head_norms(dense_layer(config, qkv_bias=bias, o_bias=bias)), config, kind)


def qwen_types(config: Config, count: int) -> Sequence[str]:
    """Those from `max_window_layers` on are within the window, where it is used at all."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return (FULL,) * count
    most = config.get("max_window_layers", count)
    return [SLIDING if index >= most else FULL for index in range(count)]


def _phi3(config: Config, kind: str) -> LayerSpec:
    """Llama's layer without biases, kept as one tensor for q, k and v and one for gate and up."""
    if rope_type(config) in SUPPORTED_TYPES[1:]:
        raise KernelsMissingError("rope_scaling", rope_type(config), "only default is supported for Phi3ForCausalLM")
    return windowed(partly_turned(fused(dense_layer(config)), config), config, kind)


def _olmo2(config: Config, kind: str) -> LayerSpec:
    """Norms of what attention and MLP give, not of what they take, and of q and k over all their heads."""
    bias = bool(config.get("attention_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=bias)
    return windowed(norms_after(norms_of_all_heads(layer)), config, kind)


def norms_of_all_heads(layer: LayerSpec) -> LayerSpec:
    """With norms of q and of k over all their heads."""
    attention = layer.attention
    q_norm = NormSpec("self_attn.q_norm", attention.heads, Cut.COLUMN)
    k_norm = NormSpec("self_attn.k_norm", attention.kv_heads, Cut.COLUMN)
    return replace(layer, attention=replace(attention, q_norm=q_norm, k_norm=k_norm))


def _olmo3(config: Config, kind: str) -> LayerSpec:
    """Types of layers turn by parameters of their own."""
    layer = _olmo2(config, kind)
    return replace(layer, attention=replace(layer.attention, rotation=Rotation(layer_type=kind)))


def norms_after(layer: LayerSpec) -> LayerSpec:
    """With norms of what attention and MLP give alone."""
    hidden = Dim(layer.hidden_size)
    return replace(
        layer,
        before_attention=None,
        after_attention=NormSpec("post_attention_layernorm", hidden),
        before_mlp=None,
        after_mlp=NormSpec("post_feedforward_layernorm", hidden),
    )


def _seed_oss(config: Config, kind: str) -> LayerSpec:
    bias, out = bool(config.get("attention_bias", True)), bool(config.get("attention_out_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=out, mlp_bias=bool(config.get("mlp_bias", False)))
    return windowed(layer, config, kind)


def _granite(config: Config, kind: str) -> LayerSpec:
    """Llama's layer with factors: of scores, and of what each block adds."""
    layer = _llama(config, kind)
    layer = scaled_scores(layer, number(config, "attention_multiplier", 1.0))
    return scaled_blocks(layer, number(config, "residual_multiplier", 1.0))


def _exaone4(config: Config, kind: str) -> LayerSpec:
    """Norms of what blocks give; in mixed stacks full layers are not turned."""
    layer = windowed(norms_after(head_norms(dense_layer(config))), config, kind)
    return unturned(layer) if config.get("sliding_window") is not None and kind == FULL else layer


def _exaone4_types(config: Config, count: int) -> Sequence[str]:
    if config.get("sliding_window") is None:
        return (FULL,) * count
    pattern = config.get("sliding_window_pattern", 4)
    every = len(pattern) if isinstance(pattern, str) else int(pattern or count + 1)
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(count)]


_GROUPED = {"num_key_value_heads": 2}
_UNPADDED = _GROUPED | {"pad_token_id": None}
_MIXED = {"sliding_window": 37, "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]}

LLAMA = {
    "LlamaForCausalLM": Architecture(layer=_llama),
    "MistralForCausalLM": Architecture(
        layer=_mistral, layer_types=all_sliding, example=_GROUPED | {"sliding_window": 37}
    ),
    "MinistralForCausalLM": Architecture(
        layer=_mistral, layer_types=all_sliding, example=_GROUPED | _MIXED | {"head_dim": 24}
    ),
    "MiMoForCausalLM": Architecture(layer=_qwen2, layer_types=qwen_types),
    "Qwen2ForCausalLM": Architecture(
        layer=_qwen2, layer_types=qwen_types,
        example=_GROUPED | {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2},
    ),
    "Qwen3ForCausalLM": Architecture(layer=_qwen3, layer_types=qwen_types),
    "Phi3ForCausalLM": Architecture(
        layer=_phi3, layer_types=all_sliding, norm_eps=1e-5,
        example=_UNPADDED | {"sliding_window": 300, "partial_rotary_factor": 0.75},
    ),
    "Olmo2ForCausalLM": Architecture(layer=_olmo2, norm_eps=1e-5),
    "Olmo3ForCausalLM": Architecture(
        layer=_olmo3, layer_types=_exaone4_types, norm_eps=1e-5,
        example=_UNPADDED | _MIXED | {"rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
            FULL: {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
        }},
    ),
    "SeedOssForCausalLM": Architecture(
        layer=_seed_oss, example=_UNPADDED | {"head_dim": 24, "attention_out_bias": True}
    ),
    "GraniteForCausalLM": Architecture(
        layer=_granite, embedding_scale=lambda config: number(config, "embedding_multiplier", 1.0),
        example=_UNPADDED | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                             "attention_multiplier": 0.2},
    ),
    "Exaone4ForCausalLM": Architecture(
        layer=_exaone4, layer_types=_exaone4_types, norm_eps=1e-5, example=_UNPADDED | _MIXED
    ),
}  # fmt: skip

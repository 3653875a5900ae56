"""GLM, ERNIE and SmolLM: heads that are turned in part, pair by pair, or in some layers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from db.errors import UserError
from profiler.model.architectures.architecture import Architecture, Config
from profiler.model.architectures.dense import dense_layer, fused_mlp, partly_turned, unturned, windowed
from profiler.model.fields import positive
from profiler.model.spec import LayerSpec
from profiler.model.tensors import Dim, NormSpec


def _glm(config: Config, _kind: str) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    return partly_turned(fused_mlp(dense_layer(config, qkv_bias=bias)), config, interleaved=True, default=0.5)


def _glm4(config: Config, kind: str) -> LayerSpec:
    """With norms of what blocks give beside those of what they take."""
    layer = _glm(config, kind)
    hidden = Dim(layer.hidden_size)
    return replace(
        layer,
        after_attention=NormSpec("post_self_attn_layernorm", hidden),
        after_mlp=NormSpec("post_mlp_layernorm", hidden),
    )


def _ernie(config: Config, kind: str) -> LayerSpec:
    """Llama's layer whose heads are turned pair by pair."""
    bias = bool(config.get("use_bias", False))
    layer = windowed(dense_layer(config, qkv_bias=bias, o_bias=bias, mlp_bias=bias), config, kind)
    return partly_turned(layer, config, interleaved=True)


def _smollm3(config: Config, kind: str) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
    made = windowed(layer, config, kind.removesuffix(_UNTURNED))
    return unturned(made) if kind.endswith(_UNTURNED) else made


def _smollm3_types(config: Config, types: Sequence[str]) -> Sequence[str]:
    """Of every few layers one is not turned, or those whose entry in `no_rope_layers` is 0."""
    interval = positive(config, "no_rope_layer_interval", 4)
    listed = config.get("no_rope_layers")
    turned = listed or [int((index + 1) % interval != 0) for index in range(len(types))]
    if not isinstance(turned, list) or len(turned) < len(types):
        raise UserError("no_rope_layers", listed, f"must be a list of {len(types)} in config.json, one a layer")
    return [kind if has_rope else kind + _UNTURNED for kind, has_rope in zip(types, turned, strict=False)]


_UNTURNED = " unturned"
_SMALL = {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "pad_token_id": None}

GLM = {
    "GlmForCausalLM": Architecture(layer=_glm, norm_eps=1.5625e-07, example=_SMALL),
    "Glm4ForCausalLM": Architecture(layer=_glm4, norm_eps=1.5625e-07, example=_SMALL),
    "Ernie4_5ForCausalLM": Architecture(
        layer=_ernie, norm_eps=1e-5, tied=True,
        example={"num_key_value_heads": 2, "head_dim": 24, "use_bias": True, "pad_token_id": None},
    ),
    "SmolLM3ForCausalLM": Architecture(
        layer=_smollm3, refined=_smollm3_types, tied=True,
        example={"num_key_value_heads": 2, "pad_token_id": None, "no_rope_layer_interval": 2},
    ),
}  # fmt: skip

"""Gemma: norms that are stored without their one, embeddings scaled by the root of the hidden size, GELU gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from profiler.model.architectures.architecture import FULL, SLIDING, Architecture, Config
from profiler.model.architectures.dense import dense_layer, head_norms, number, scaled_scores, windowed, with_activation
from profiler.model.fields import KernelsMissingError, positive
from profiler.model.mlp import Activation
from profiler.model.rope import Rotation
from profiler.model.spec import LayerSpec
from profiler.model.tensors import Dim, Folding, NormSpec

_ONE_MORE = Folding(offset=1.0)


def _block(config: Config) -> LayerSpec:
    """Norms around attention and MLP, as the second generation has them."""
    bias, hidden = bool(config.get("attention_bias", False)), Dim(positive(config, "hidden_size"))
    activation = config.get("hidden_activation") or config.get("hidden_act") or Activation.GELU_TANH
    if activation != Activation.GELU_TANH:
        raise KernelsMissingError("hidden_activation", activation, f"must be {Activation.GELU_TANH}")

    def norm(name: str) -> NormSpec:
        return NormSpec(name, hidden, folding=_ONE_MORE)

    layer = with_activation(dense_layer(config, qkv_bias=bias, o_bias=bias), Activation.GELU_TANH)
    return replace(
        layer,
        before_attention=norm("input_layernorm"),
        after_attention=norm("post_attention_layernorm"),
        before_mlp=norm("pre_feedforward_layernorm"),
        after_mlp=norm("post_feedforward_layernorm"),
    )


def _masked(layer: LayerSpec, config: Config, kind: str) -> LayerSpec:
    cap = config.get("attn_logit_softcapping")
    softcap = None if cap is None else number(config, "attn_logit_softcapping", 1.0)
    layer = scaled_scores(layer, number(config, "query_pre_attn_scalar", 256.0) ** -0.5)
    return windowed(replace(layer, attention=replace(layer.attention, softcap=softcap)), config, kind)


def _gemma2(config: Config, kind: str) -> LayerSpec:
    return _masked(_block(config), config, kind)


def _gemma3(config: Config, kind: str) -> LayerSpec:
    """Norms of heads; layers within the window turn by a base of their own."""
    if config.get("use_bidirectional_attention"):
        raise KernelsMissingError("use_bidirectional_attention", True, "attention must be causal")
    layer = _masked(head_norms(_block(config), _ONE_MORE), config, kind)
    return replace(layer, attention=replace(layer.attention, rotation=Rotation(layer_type=kind)))


def _alternating(_config: Config, count: int) -> Sequence[str]:
    return [FULL if index % 2 else SLIDING for index in range(count)]


def _one_in_pattern(config: Config, count: int) -> Sequence[str]:
    every = positive(config, "sliding_window_pattern", 6)
    return [SLIDING if (index + 1) % every else FULL for index in range(count)]


def _root_of_hidden(config: Config) -> float:
    return math.sqrt(positive(config, "hidden_size"))


_SMALL = {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 37, "query_pre_attn_scalar": 16,
          "pad_token_id": None}  # fmt: skip

GEMMA = {
    "Gemma2ForCausalLM": Architecture(
        layer=_gemma2, layer_types=_alternating, embedding_scale=_root_of_hidden, final_norm=_ONE_MORE,
        activation=Activation.GELU_TANH, tied=True,
        example=_SMALL | {"attn_logit_softcapping": 5.0},
    ),
    "Gemma3ForCausalLM": Architecture(
        layer=_gemma3, layer_types=_one_in_pattern, embedding_scale=_root_of_hidden, final_norm=_ONE_MORE,
        activation=Activation.GELU_TANH, tied=True,
        example=_SMALL | {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL]},
    ),
}  # fmt: skip

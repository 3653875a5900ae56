"""The architectures that can be run: how each names and shapes what a layer consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from db.errors import UserError
from profiler.model.fields import KernelsMissingError, positive
from profiler.model.rope import rope_type
from profiler.model.spec import AttentionSpec, DenseMLP, LayerSpec
from profiler.model.tensors import Cut, Dim, LinearSpec, NormSpec, Part

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What is its own: the layer that a configuration describes, and defaults of fields that it may leave out."""

    layer: Callable[[Config], LayerSpec]
    norm_eps: float = 1e-6


def dense_layer(config: Config, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False) -> LayerSpec:
    """Attention and SwiGLU with a norm before each, under the names that Llama gave them."""
    num_heads = positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UserError("num_key_value_heads", num_kv_heads, f"must divide num_attention_heads = {num_heads}")
    hidden = Dim(positive(config, "hidden_size"))
    head_dim = positive(config, "head_dim", hidden.size // num_heads)
    if head_dim % 2:
        raise UserError("head_dim", head_dim, "must be even: the rotation turns its numbers in pairs")
    heads, kv_heads = Dim(num_heads, head_dim), Dim(num_kv_heads, head_dim)
    intermediate = Dim(positive(config, "intermediate_size"))

    q, k, v = (Part(f"self_attn.{name}_proj", rows) for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    gate, up = Part("mlp.gate_proj", intermediate), Part("mlp.up_proj", intermediate)
    o, down = Part("self_attn.o_proj", hidden), Part("mlp.down_proj", hidden)
    return LayerSpec(
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            qkv=LinearSpec(name="qkv", cut=Cut.COLUMN, parts=(q, k, v), inputs=hidden, has_bias=qkv_bias),
            o=LinearSpec(name="o", cut=Cut.ROW, parts=(o,), inputs=heads, has_bias=o_bias),
        ),
        mlp=DenseMLP(
            gate_up=LinearSpec(name="gate_up", cut=Cut.COLUMN, parts=(gate, up), inputs=hidden, has_bias=mlp_bias),
            down=LinearSpec(name="down", cut=Cut.ROW, parts=(down,), inputs=intermediate, has_bias=mlp_bias),
        ),
        before_attention=NormSpec("input_layernorm", hidden),
        before_mlp=NormSpec("post_attention_layernorm", hidden),
    )


def refuse_window(config: Config) -> None:
    """Raise `UserError` where attention is limited to a sliding window."""
    if config.get("sliding_window") is not None:
        allowed = "sliding-window attention is not supported; must be null"
        raise KernelsMissingError("sliding_window", config["sliding_window"], allowed)


def _llama(config: Config) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    return dense_layer(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Config) -> LayerSpec:
    refuse_window(config)
    return dense_layer(config)


def _qwen2(config: Config) -> LayerSpec:
    if config.get("use_sliding_window", False):
        refuse_window(config)
    return dense_layer(config, qkv_bias=True)


def _qwen3(config: Config) -> LayerSpec:
    if config.get("use_sliding_window", False):
        refuse_window(config)
    bias = bool(config.get("attention_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=bias)
    head = Dim(layer.attention.head_dim)
    q_norm, k_norm = NormSpec("self_attn.q_norm", head), NormSpec("self_attn.k_norm", head)
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def _phi3(config: Config) -> LayerSpec:
    """Llama's layer without biases, kept as one tensor for q, k and v and one for gate and up."""
    refuse_window(config)
    if rope_type(config) != "default":
        raise KernelsMissingError("rope_scaling", rope_type(config), "only default is supported for Phi3ForCausalLM")
    layer = dense_layer(config)
    qkv = layer.attention.qkv.stored_in("self_attn.qkv_proj")
    gate_up = layer.mlp.gate_up.stored_in("mlp.gate_up_proj")
    return replace(layer, attention=replace(layer.attention, qkv=qkv), mlp=replace(layer.mlp, gate_up=gate_up))


def _olmo2(config: Config) -> LayerSpec:
    """Norms of what attention and MLP give, not of what they take, and of q and k over all their heads."""
    bias = bool(config.get("attention_bias", False))
    layer = dense_layer(config, qkv_bias=bias, o_bias=bias)
    heads, kv_heads, hidden = layer.attention.heads, layer.attention.kv_heads, Dim(layer.hidden_size)
    q_norm = NormSpec("self_attn.q_norm", heads, Cut.COLUMN)
    k_norm = NormSpec("self_attn.k_norm", kv_heads, Cut.COLUMN)
    return replace(
        layer,
        attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm),
        before_attention=None,
        after_attention=NormSpec("post_attention_layernorm", hidden),
        before_mlp=None,
        after_mlp=NormSpec("post_feedforward_layernorm", hidden),
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture(layer=_llama),
        "MistralForCausalLM": Architecture(layer=_mistral),
        "MiMoForCausalLM": Architecture(layer=_qwen2),
        "Qwen2ForCausalLM": Architecture(layer=_qwen2),
        "Qwen3ForCausalLM": Architecture(layer=_qwen3),
        "Phi3ForCausalLM": Architecture(layer=_phi3, norm_eps=1e-5),
        "Olmo2ForCausalLM": Architecture(layer=_olmo2, norm_eps=1e-5),
    }
)

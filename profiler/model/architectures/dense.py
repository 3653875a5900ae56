"""Dense layers: attention and a gated MLP, in the variations that families make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from db.errors import UserError
from profiler.model.architectures.architecture import FULL, SLIDING, Config
from profiler.model.fields import KernelsMissingError, positive, positive_number
from profiler.model.mlp import Activation, DenseMLP
from profiler.model.rope import Rotation, head_order, turned_share
from profiler.model.spec import AttentionSpec, LayerSpec
from profiler.model.tensors import AS_STORED, Cut, Dim, Folding, LinearSpec, NormSpec, TensorPart


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
    q, k, v = (
        TensorPart(f"self_attn.{name}_proj", rows) for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    o = TensorPart("self_attn.o_proj", hidden)
    return LayerSpec(
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            qkv=LinearSpec(name="qkv", cut=Cut.COLUMN, parts=(q, k, v), inputs=hidden, has_bias=qkv_bias),
            o=LinearSpec(name="o", cut=Cut.ROW, parts=(o,), inputs=heads, has_bias=o_bias),
        ),
        mlp=gated_mlp(hidden, Dim(positive(config, "intermediate_size")), has_bias=mlp_bias),
        before_attention=NormSpec("input_layernorm", hidden),
        before_mlp=NormSpec("post_attention_layernorm", hidden),
    )


def gated_mlp(hidden: Dim, intermediate: Dim, *, prefix: str = "mlp", has_bias: bool = False) -> DenseMLP:
    """SwiGLU of `intermediate` features."""
    gate, up = TensorPart(f"{prefix}.gate_proj", intermediate), TensorPart(f"{prefix}.up_proj", intermediate)
    down = TensorPart(f"{prefix}.down_proj", hidden)
    return DenseMLP(
        gate_up=LinearSpec(name="gate_up", cut=Cut.COLUMN, parts=(gate, up), inputs=hidden, has_bias=has_bias),
        down=LinearSpec(name="down", cut=Cut.ROW, parts=(down,), inputs=intermediate, has_bias=has_bias),
    )


def windowed(layer: LayerSpec, config: Config, kind: str) -> LayerSpec:
    """The layer as that type of layer: full, or within the configuration's sliding window."""
    if kind == FULL:
        return layer
    if kind != SLIDING:
        raise KernelsMissingError("layer_types", kind, f"supported are {FULL} and {SLIDING}")
    return replace(layer, attention=replace(layer.attention, window=positive(config, "sliding_window")))


def head_norms(layer: LayerSpec, folding: Folding = AS_STORED) -> LayerSpec:
    """With norms of each query head and each key head."""
    head = Dim(layer.attention.head_dim)
    q_norm, k_norm = (NormSpec(f"self_attn.{name}_norm", head, folding=folding) for name in "qk")
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def fused(layer: LayerSpec) -> LayerSpec:
    """Kept as one tensor for q, k and v and one for gate and up."""
    return fused_mlp(
        replace(
            layer,
            attention=replace(layer.attention, qkv=layer.attention.qkv.stored_in("self_attn.qkv_proj")),
        )
    )


def fused_mlp(layer: LayerSpec) -> LayerSpec:
    """Kept as one tensor for gate and up."""
    assert isinstance(layer.mlp, DenseMLP)
    return replace(layer, mlp=replace(layer.mlp, gate_up=layer.mlp.gate_up.stored_in("mlp.gate_up_proj")))


def scaled_scores(layer: LayerSpec, factor: float) -> LayerSpec:
    """Scores of q and k times `factor`, where kernels divide them by the root of head_dim."""
    folding = Folding(scale=factor * math.sqrt(layer.attention.head_dim))
    attention = layer.attention
    if attention.q_norm is not None:
        norm = attention.q_norm
        made = replace(attention, q_norm=replace(norm, folding=replace(norm.folding, scale=folding.scale)))
    else:
        made = replace(attention, qkv=attention.qkv.folded(folding, parts=(0,)))
    return replace(layer, attention=made)


def scaled_blocks(layer: LayerSpec, factor: float) -> LayerSpec:
    """What attention and MLP add to the residual stream, times `factor`."""
    assert isinstance(layer.mlp, DenseMLP)
    folding = Folding(scale=factor)
    return replace(
        layer,
        attention=replace(layer.attention, o=layer.attention.o.folded(folding)),
        mlp=replace(layer.mlp, down=layer.mlp.down.folded(folding)),
    )


def partly_turned(layer: LayerSpec, config: Config, *, interleaved: bool = False, default: float = 1.0) -> LayerSpec:
    """With heads of which the configuration turns the first features alone, or pairs that lie side by side."""
    attention, head_dim = layer.attention, layer.attention.head_dim
    share = turned_share(config, default)
    features = int(head_dim * share)
    if features % 2 or not 0 < features <= head_dim:
        raise UserError("partial_rotary_factor", share, f"must leave an even part of {head_dim} features")
    folding = Folding(order=head_order(head_dim, features=features, interleaved=interleaved))
    made = replace(
        attention,
        q_norm=_in_order(attention.q_norm, folding),
        k_norm=_in_order(attention.k_norm, folding),
        qkv=attention.qkv.folded(folding, parts=(0, 1)),
        rotation=replace(attention.rotation, features=features if features < head_dim else None),
    )
    return replace(layer, attention=made)


def _in_order(norm: NormSpec | None, folding: Folding) -> NormSpec | None:
    """The norm of each head with its features in another order."""
    return None if norm is None else replace(norm, folding=replace(norm.folding, order=folding.order))


def unturned(layer: LayerSpec) -> LayerSpec:
    """Without a rotation (Kazemnejad et al., 2023)."""
    return replace(layer, attention=replace(layer.attention, rotation=Rotation(is_off=True)))


def with_activation(layer: LayerSpec, activation: Activation) -> LayerSpec:
    """With another function of the gate."""
    assert isinstance(layer.mlp, DenseMLP)
    return replace(layer, mlp=replace(layer.mlp, activation=activation))


def number(config: Config, field: str, default: float) -> float:
    """A number above 0, or its default."""
    value = config.get(field)
    return default if value is None else positive_number(field, value)


def all_sliding(config: Config, count: int) -> Sequence[str]:
    """Every layer is within the window where the configuration has one."""
    return (FULL if config.get("sliding_window") is None else SLIDING,) * count

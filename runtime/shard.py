"""What one rank holds of a model: its stage's layers cut for tensor parallelism, and the ends of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiler.comm.group import TensorGroup
from profiler.head import Head
from profiler.layer import DecoderLayer, Norms
from profiler.linear import Linear
from profiler.model import ModelShape
from runtime.checkpoint import ALL, Weights
from runtime.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The weights of one rank; the embedding on the first stage only, the head on the last only."""

    layers: tuple[DecoderLayer, ...]
    embedding: torch.Tensor | None  # [V, hidden], whole on each tensor-parallel rank: a look-up moves nothing
    head: Head | None  # a slice of the vocabulary


def load_shard(shape: ModelShape, place: Place, weights: Weights, group: TensorGroup) -> Shard:
    """Read this rank's slices, no others."""
    return Shard(
        layers=tuple(_load_layer(shape, index, place, weights, group) for index in place.layers),
        embedding=weights.read("model.embed_tokens.weight") if place.is_first else None,
        head=_load_head(shape, place, weights, group) if place.is_last else None,
    )


def _load_layer(shape: ModelShape, index: int, place: Place, weights: Weights, group: TensorGroup) -> DecoderLayer:
    prefix, tp_size = f"model.layers.{index}", place.parallel.tp_size
    q_rows = _share(shape.num_heads * shape.head_dim, place)
    kv_rows = _kv_rows(shape, place)
    ffn_rows = _share(shape.intermediate_size, place)

    def fused(*parts: tuple[str, slice], bias: bool) -> Linear:
        weight = torch.cat([weights.read(f"{prefix}.{name}.weight", rows) for name, rows in parts])
        biases = [weights.read(f"{prefix}.{name}.bias", rows) for name, rows in parts] if bias else None
        return Linear(weight, torch.cat(biases) if biases else None)

    def row_parallel(name: str, columns: slice) -> Linear:
        return Linear(weights.read(f"{prefix}.{name}.weight", ALL, columns))

    def bias_of(name: str, present: bool) -> torch.Tensor | None:
        return weights.read(f"{prefix}.{name}.bias") if present else None

    attention = f"{prefix}.self_attn"
    return DecoderLayer(
        shape,
        tp_size,
        norms=Norms(
            before_attention=weights.read(f"{prefix}.input_layernorm.weight"),
            before_mlp=weights.read(f"{prefix}.post_attention_layernorm.weight"),
            query=weights.read(f"{attention}.q_norm.weight") if shape.qk_norm else None,
            key=weights.read(f"{attention}.k_norm.weight") if shape.qk_norm else None,
            eps=shape.norm_eps,
        ),
        qkv=fused(
            ("self_attn.q_proj", q_rows),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
            bias=shape.qkv_bias,
        ),
        o=row_parallel("self_attn.o_proj", q_rows),
        gate_up=fused(("mlp.gate_proj", ffn_rows), ("mlp.up_proj", ffn_rows), bias=shape.mlp_bias),
        down=row_parallel("mlp.down_proj", ffn_rows),
        reduce_o=group.reduce(bias_of("self_attn.o_proj", shape.o_bias)),
        reduce_down=group.reduce(bias_of("mlp.down_proj", shape.mlp_bias)),
    )


def _load_head(shape: ModelShape, place: Place, weights: Weights, group: TensorGroup) -> Head:
    rows = _share(shape.vocab_size, place)
    name = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    return Head(
        weights.read("model.norm.weight"),
        shape.norm_eps,
        Linear(weights.read(name, rows)),
        first_id=rows.start,
        gather=group.gather if place.parallel.tp_size > 1 else None,
    )


def _share(length: int, place: Place) -> slice:
    """This rank's part of `length` rows; parts differ by one row at most where tp_size does not divide it."""
    tp_rank, tp_size = place.tp_rank, place.parallel.tp_size
    return slice(length * tp_rank // tp_size, length * (tp_rank + 1) // tp_size)


def _kv_rows(shape: ModelShape, place: Place) -> slice:
    """Rows of this rank's KV heads; ranks share a head when there are fewer heads than ranks."""
    first = shape.num_kv_heads * place.tp_rank // place.parallel.tp_size
    count = shape.kv_heads_per_rank(place.parallel.tp_size)
    return slice(first * shape.head_dim, (first + count) * shape.head_dim)

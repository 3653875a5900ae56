"""A model: its embedding, its layers one by one, and its head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from db.errors import UserError
from profiler.model.precision import PRECISIONS
from profiler.model.quantization import Quantization
from profiler.model.rope import rope_type
from profiler.model.spec import LayerSpec
from profiler.model.tensors import LinearSpec, NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer as its configuration describes it; layers may differ from one another.

    `config` keeps the content of `config.json`: the runtime takes rotary scaling from it, plans carry it.
    """

    name: str
    architecture: str
    embedding: LinearSpec  # [vocab, hidden], looked up and not multiplied
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    head: LinearSpec
    norm_eps: float
    max_positions: int
    dtype: str  # of the checkpoint, of its plain tensors where others are quantized
    config: Mapping[str, Any]
    quantization: Quantization | None = None  # of the checkpoint

    @property
    def num_layers(self) -> int:
        """How many decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Features of a token between layers."""
        return self.embedding.inputs.size

    @property
    def vocab_size(self) -> int:
        """How many different tokens."""
        return self.embedding.sizes()[0]

    @property
    def positions_words(self) -> str:
        """How many positions there are, and what makes them more."""
        if rope_type(self.config) == "yarn":
            more = "a larger rope_scaling.factor makes them more"
        else:
            scaling = f'{{"rope_type": "yarn", "factor": F, "original_max_position_embeddings": {self.max_positions}}}'
            more = (
                f'"rope_scaling": {scaling} in its config.json makes them F times as many, where it was made for that'
            )
        return f"{self.name} has {self.max_positions} positions; {more}"

    @property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """The layers that differ, each once."""
        first = self.layers[0]
        if all(layer is first for layer in self.layers):  # as most models are made: nothing to hash
            return (first,)
        return tuple(dict.fromkeys(self.layers))

    @property
    def layer(self) -> LayerSpec:
        """What all layers are; raises `UserError` where they differ."""
        kinds = self.layer_kinds
        if len(kinds) > 1:
            raise UserError("MODEL", self.name, f"has {len(kinds)} kinds of layers; times of a layer are told for one")
        return kinds[0]

    @property
    def fingerprint(self) -> str:
        """Short hash of what decides a kernel's work; two checkpoints of one shape share measurements."""
        parts: tuple[object, ...] = (self.architecture, self.embedding, self.layers, self.final_norm, self.head)
        kept = [linear.name for layer in self.layers for linear in layer.linears if linear.kept]
        parts += (kept,) if kept else ()
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint must hold."""
        shapes = self.embedding.tensors()
        for index, layer in enumerate(self.layers):
            shapes |= {f"{layer_prefix(index)}{name}": size for name, size in layer.tensors().items()}
        return shapes | self.final_norm.tensors() | self.head.tensors()

    def check_tp_size(self, tp_size: int) -> None:
        """Raise `UserError` unless heads, KV heads and the MLP of all layers can be split over `tp_size` ranks."""
        for layer in self.layer_kinds:
            heads, kv_heads = layer.attention.heads.count, layer.attention.kv_heads.count
            intermediate = layer.mlp.intermediate.count
            if tp_size < 1 or heads % tp_size:
                raise UserError("tp_size", tp_size, f"must divide num_attention_heads = {heads} of {self.name}")
            if kv_heads % tp_size and tp_size % kv_heads:
                allowed = f"must divide, or be a multiple of, num_key_value_heads = {kv_heads} of {self.name}"
                raise UserError("tp_size", tp_size, allowed)
            if intermediate % tp_size:
                raise UserError("tp_size", tp_size, f"must divide intermediate_size = {intermediate} of {self.name}")


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with in a checkpoint."""
    return f"model.layers.{index}."


def default_dtype(shape: ModelShape, device_type: str) -> str:
    """The model's own precision on CUDA; with float32 on a CPU, where it is the fast one."""
    plain = shape.dtype if device_type == "cuda" else "float32"
    return plain if shape.quantization is None else shape.quantization.precision(PRECISIONS[plain].activations)

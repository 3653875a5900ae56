"""A model: its embedding, its layers one by one, and its head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from db.errors import UserError
from profiler.model.experts import Dispatch, ExpertsMLP
from profiler.model.fields import KernelsMissingError
from profiler.model.precision import PRECISIONS, Precision
from profiler.model.quantization import Quantization
from profiler.model.rope import rope_type
from profiler.model.spec import LayerSpec
from profiler.model.tensors import AS_STORED, Cut, LinearSpec, NormSpec
from profiler.model.whole.layer import WholeLayer

Layer = LayerSpec | WholeLayer


class Backend(StrEnum):
    """What runs a model's layers."""

    OWN = "own"  # the kernels here
    TRANSFORMERS = "transformers"  # the library's modules, a chunk of a request at a time
    PLANNING = "planning only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Parameters as Transformers counts them: of all that the configuration describes, and of its text decoder."""

    all: int
    text: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer as its configuration describes it; layers may differ from one another.

    `config` keeps the content of `config.json`: the runtime takes rotary scaling from it, plans carry it.
    """

    name: str
    architecture: str
    embedding: LinearSpec  # [vocab, hidden], looked up and not multiplied
    every_layer: tuple[Layer, ...]
    final_norm: NormSpec
    head: LinearSpec
    norm_eps: float
    max_positions: int
    dtype: str  # of the checkpoint, of its plain tensors where others are quantized
    config: Mapping[str, Any]
    quantization: Quantization | None = None  # of the checkpoint
    weight_format: str = ""  # of the checkpoint's linears; "" where it is `dtype`
    unread: str | None = None  # why weights in that format are not read
    backend: Backend = Backend.OWN
    unrun: str | None = None  # why no backend runs it
    counted: Counted | None = None

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers as kernels here run them; raises `UserError` where they are known as wholes only."""
        own = tuple(layer for layer in self.every_layer if isinstance(layer, LayerSpec))
        if len(own) < self.num_layers:
            raise UserError("MODEL", self.name, f"{self.architecture} has layers without kernels here")
        return own

    @property
    def num_layers(self) -> int:
        """How many decoder layers."""
        return len(self.every_layer)

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
        """The layers that differ, each once; see `layers`."""
        found = self.every_kind
        own = tuple(layer for layer in found if isinstance(layer, LayerSpec))
        return own if len(own) == len(found) else self.layers  # which says what is missing

    @property
    def every_kind(self) -> tuple[Layer, ...]:
        """The layers that differ, each once, whoever runs them."""
        objects = {id(layer): layer for layer in self.every_layer}  # few, as most models are made, and little to hash
        return tuple(dict.fromkeys(objects.values()))

    @property
    def layer(self) -> LayerSpec:
        """What all layers are; raises `UserError` where they differ."""
        kinds = self.layer_kinds
        if len(kinds) > 1:
            raise UserError("MODEL", self.name, f"has {len(kinds)} kinds of layers; times of a layer are given for one")
        return kinds[0]

    @property
    def fingerprint(self) -> str:
        """Short hash of what decides a kernel's work; two checkpoints of one shape share measurements."""
        parts: tuple[object, ...] = (self.architecture, self.embedding, self.every_layer, self.final_norm, self.head)
        own = [layer for layer in self.every_layer if isinstance(layer, LayerSpec)]
        kept = [linear.name for layer in own for linear in layer.linears if linear.kept]
        parts += (kept,) if kept else ()
        masked = [(index, layer.attention.masking) for index, layer in enumerate(own) if layer.attention.masking]
        parts += (masked,) if masked else ()
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        if self.counted is not None:
            return self.counted.all
        layers = sum(layer.num_elements() for layer in self.every_layer)
        ends = self.embedding.tensors() | self.final_norm.tensors() | self.head.tensors()
        return layers + sum(math.prod(size) for size in ends.values())

    @property
    def num_text_parameters(self) -> int:
        """Those of the text decoder: what a plan is about."""
        return self.counted.text if self.counted else self.num_parameters

    def spread(self, ep_size: int, *, beside: int = 1, dispatch: Dispatch = Dispatch.NONE) -> ModelShape:
        """The same with experts spread so: see `ExpertsMLP`."""
        if ep_size * beside == 1 or not self.has_experts:
            return self
        layers = self.layers
        alike = {id(layer): layer for layer in layers}  # hashing all of them would take most of a plan's counting
        made = {key: layer.spread(ep_size, beside=beside, dispatch=dispatch) for key, layer in alike.items()}
        return replace(self, every_layer=tuple(made[id(layer)] for layer in layers))

    def spread_sizes(self, tp_size: int) -> tuple[int, ...]:
        """Every number of groups, from 1, that experts can be spread over in a tensor-parallel group; (1,) without any.

        The model can be split over `tp_size` ranks.
        """
        if not self.has_experts:
            return (1,)
        return tuple(size for size in range(1, tp_size + 1) if tp_size % size == 0 and self._can_spread(size, tp_size))

    def _can_spread(self, ep_size: int, tp_size: int) -> bool:
        with suppress(UserError):
            self.spread(ep_size).check_tp_size(tp_size)
            return True
        return False

    @property
    def has_experts(self) -> bool:
        """Whether kernels here run experts of it, which can be spread."""
        return any(isinstance(layer, LayerSpec) and layer.experts is not None for layer in self.every_kind)

    @property
    def has_latents(self) -> bool:
        """Whether kernels here run latent attention of it."""
        return any(isinstance(layer, LayerSpec) and layer.attention.latent is not None for layer in self.every_kind)

    @property
    def experts_or_latents(self) -> str:
        """Which of both it has, in words."""
        return "experts" if self.has_experts else "latents"

    def check_precision(self, precision: Precision, *, field: str) -> None:
        """Raise `UserError` where kernels here do not run experts or latents of it so."""
        if precision.has_kv_scales and (self.has_experts or self.has_latents):
            allowed = f"one of plain keys and values: {self.experts_or_latents} of {self.name} are run with them alone"
            raise UserError(field, precision.name, allowed)
        if not self.has_experts or precision.linears is None:
            return
        if any(layer.experts and layer.experts.tensors_of.is_stacked for layer in self.layer_kinds):
            raise UserError(field, precision.name, f"a plain one: all experts of a layer of {self.name} are one tensor")
        if precision.linears.is_calibrated:
            allowed = f"w8a16, w8a8 or fp8: experts of {self.name} are not run with ranges found beforehand"
            raise UserError(field, precision.name, allowed)

    def check_device(self, device_type: str) -> None:
        """Raise `KernelsMissingError` where kernels here have what layers need on other devices alone."""
        if device_type == "cpu":
            return
        for layer in self.layer_kinds:
            if layer.lacks_on_cards:
                allowed = f"kernels here run {layer.lacks_on_cards} on CPUs alone; take --backend transformers"
                raise KernelsMissingError("MODEL", self.architecture, allowed)

    def check_as_stored(self, field: str, purpose: str, *, with_experts: bool = False) -> None:
        """Raise `UserError` where layers run otherwise than with their checkpoint's very numbers, or have experts."""
        for layer in self.layer_kinds:
            if not layer.is_as_stored or (layer.experts and not with_experts):
                allowed = f"a model of plain dense layers: {layer.kind} of {self.architecture} is run, not {purpose}"
                raise UserError(field, self.name, allowed)
        if self.embedding.is_folded or self.head.is_folded or self.final_norm.folding != AS_STORED:
            allowed = f"a model whose ends are as in its checkpoint: {self.architecture} is run, not {purpose}"
            raise UserError(field, self.name, allowed)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint must hold."""
        shapes = self.embedding.tensors()
        for index, layer in enumerate(self.layers):
            shapes |= {f"{layer_prefix(index)}{name}": size for name, size in layer.tensors().items()}
        return shapes | self.final_norm.tensors() | self.head.tensors()

    def check_tp_size(self, tp_size: int) -> None:
        """Raise `UserError` unless heads, KV heads and the MLP of all layers can be split over `tp_size` ranks."""
        if self.backend is not Backend.OWN:
            if tp_size != 1:
                raise UserError("tp_size", tp_size, f"must be 1: the layers of {self.name} are run as wholes")
            return
        for layer in self.layer_kinds:
            heads, kv_heads = layer.attention.heads.count, layer.attention.kv_heads.count
            mlp = layer.mlp
            intermediate = mlp.features.count if isinstance(mlp, ExpertsMLP) else mlp.intermediate.count
            if tp_size < 1 or heads % tp_size:
                raise UserError("tp_size", tp_size, f"must divide num_attention_heads = {heads} of {self.name}")
            if kv_heads % tp_size and tp_size % kv_heads:
                allowed = f"must divide, or be a multiple of, num_key_value_heads = {kv_heads} of {self.name}"
                raise UserError("tp_size", tp_size, allowed)
            if isinstance(mlp, ExpertsMLP):
                ep_size = mlp.ep_size
                if mlp.num_groups > mlp.experts.count and mlp.beside > 1:
                    allowed = f"at most the {mlp.experts.count} experts of {self.name}"
                    raise UserError("ep_size", mlp.num_groups, allowed)
                if tp_size % ep_size or ep_size > mlp.experts.count:
                    allowed = f"must divide tp_size = {tp_size}, at most the {mlp.experts.count} experts of {self.name}"
                    raise UserError("ep_size", ep_size, allowed)
                if mlp.shared and mlp.shared.gate_up.cut is Cut.COLUMN and mlp.shared.intermediate.count % tp_size:
                    allowed = f"must divide the {mlp.shared.intermediate.count} features of shared experts"
                    raise UserError("tp_size", tp_size, allowed)
                if intermediate % (tp_size // ep_size):
                    allowed = f"over ep_size must divide the {intermediate} features of experts of {self.name}"
                    raise UserError("tp_size", tp_size, allowed)
            elif intermediate % tp_size:
                raise UserError("tp_size", tp_size, f"must divide intermediate_size = {intermediate} of {self.name}")


def layer_prefix(index: int) -> str:
    """What the names of a layer's tensors begin with in a checkpoint."""
    return f"model.layers.{index}."


def default_dtype(shape: ModelShape, device_type: str) -> str:
    """The model's own precision on CUDA; with float32 on a CPU, where it is the fast one."""
    plain = shape.dtype if device_type == "cuda" else "float32"
    return plain if shape.quantization is None else shape.quantization.precision(PRECISIONS[plain].activations)

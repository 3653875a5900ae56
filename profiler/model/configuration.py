"""The typed door for Hugging Face configurations: what a decoder's shape is, and which shapes can be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.errors import UserError
from profiler.model.architectures import ARCHITECTURES
from profiler.model.fields import positive, positive_number
from profiler.model.precision import plain_precision
from profiler.model.quantization import FIELD, Quantization, quantization_of
from profiler.model.rope import check_rope, longest_prompt
from profiler.model.shape import ModelShape, layer_prefix
from profiler.model.spec import LayerSpec
from profiler.model.tensors import Cut, Dim, LinearSpec, NormSpec, Part

MAX_LAYERS = 10_000


def model_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Read a configuration; raises `UserError` that names the field for anything that cannot be run exactly."""
    _refuse_unsupported(config)
    check_rope(config)
    quantization = quantization_of(config)
    named = _architecture(config)
    architecture = ARCHITECTURES[named]
    layer = architecture.layer(config)
    hidden, vocab = Dim(layer.hidden_size), Dim(positive(config, "vocab_size"))
    embedding = Part("model.embed_tokens", vocab)
    head = embedding if config.get("tie_word_embeddings", False) else Part("lm_head", vocab)
    return ModelShape(
        name=name,
        architecture=named,
        embedding=LinearSpec(name="embedding", cut=Cut.REPLICATED, parts=(embedding,), inputs=hidden),
        layers=_layers(layer, positive(config, "num_hidden_layers", most=MAX_LAYERS), quantization),
        final_norm=NormSpec("model.norm", hidden),
        head=LinearSpec(name="head", cut=Cut.COLUMN, parts=(head,), inputs=hidden),
        norm_eps=positive_number("rms_norm_eps", config.get("rms_norm_eps", architecture.norm_eps)),
        max_positions=longest_prompt(config),
        dtype=_dtype(config),
        config=dict(config),
        quantization=quantization,
    )


def _layers(layer: LayerSpec, count: int, quantization: Quantization | None) -> tuple[LayerSpec, ...]:
    """The layers, each with the linears that the checkpoint keeps plain."""
    if quantization is None:
        return (layer,) * count
    group_size = quantization.scale_columns
    return tuple(layer.keeping(_kept(layer, index, quantization), group_size=group_size) for index in range(count))


def _kept(layer: LayerSpec, index: int, quantization: Quantization) -> frozenset[str]:
    """Names of the linears that are plain; raises `UserError` where one is in parts of either kind."""
    kept = set()
    for linear in layer.linears:
        names = [layer_prefix(index) + part.tensor for part in linear.parts]
        plain = [name for name in names if quantization.keep(name)]
        if plain and len(plain) < len(names):
            raise UserError(FIELD, plain[0], f"is plain, so all of {', '.join(names)} must be")
        if plain:
            kept.add(linear.name)
    return frozenset(kept)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Anything that would run and be wrong is refused here, by name."""
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        raise UserError("architectures", architecture, "supported are " + ", ".join(ARCHITECTURES))
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise UserError("layer_types", layer_types, "must be a list in config.json")
    for kind in layer_types:
        if kind != "full_attention":
            raise UserError("layer_types", kind, "only full_attention layers are supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError("hidden_act", config["hidden_act"], "only silu is supported")


def _architecture(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    return str(found[0] if isinstance(found, list) and found else found)


def _dtype(config: Mapping[str, Any]) -> str:
    value = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return plain_precision(value).name

"""The typed door for Hugging Face configurations: what a decoder's shape is, and which shapes can be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from db.errors import UserError
from profiler.model.architectures.architecture import Architecture
from profiler.model.architectures.table import ARCHITECTURES
from profiler.model.experts import EXPERTS
from profiler.model.fields import KernelsMissingError, positive, positive_number
from profiler.model.precision import plain_precision
from profiler.model.quantization import FIELD, Quantization, UnreadFormatError, quantization_of, weight_format
from profiler.model.rope import check_rope, longest_prompt
from profiler.model.shape import Backend, Counted, ModelShape, layer_prefix
from profiler.model.spec import LayerSpec
from profiler.model.tensors import Cut, Dim, Folding, LinearSpec, NormSpec, TensorPart
from profiler.model.whole.blocks import PLANNED
from profiler.model.whole.described import described


def model_from_config(
    config: Mapping[str, Any], *, name: str, backend: str = "auto", device_type: str = "cpu"
) -> ModelShape:
    """Read a configuration; raises `UserError` that names the field for anything that cannot be run or planned.

    backend: `own` or `transformers` to take these kernels or that library; `auto` takes the library where kernels here
    lack something on devices of `device_type`.
    """
    named = _architecture(config)
    if backend != Backend.TRANSFORMERS and named in ARCHITECTURES:
        try:
            shape = _own(config, named, name)
            shape.check_device(device_type)
            return shape
        except KernelsMissingError as lacking:
            if backend == Backend.OWN:
                raise
            try:
                return _whole(config, named, name)
            except UserError:
                raise lacking from None
    if backend == Backend.OWN:
        raise UserError("architectures", named, "supported are " + ", ".join(ARCHITECTURES))
    return _whole(config, named, name)


def _own(config: Mapping[str, Any], named: str, name: str) -> ModelShape:
    """A model of layers that kernels here run."""
    architecture = ARCHITECTURES[named]
    _refuse_unsupported(config, architecture)
    quantization, unread = _quantization(config)
    layers = architecture.layers(config)
    check_rope(config, dict.fromkeys(layer.attention.rotation for layer in layers))
    ends = _ends(config, {"tie_word_embeddings": architecture.tied} | dict(config), layers[0].hidden_size)
    scale = Folding(scale=architecture.embedding_scale(config))
    return ModelShape(
        **ends
        | {
            "embedding": ends["embedding"].folded(scale),
            "final_norm": replace(ends["final_norm"], folding=architecture.final_norm),
        },
        name=name,
        architecture=named,
        every_layer=_layers(layers, quantization),
        norm_eps=positive_number("rms_norm_eps", config.get("rms_norm_eps", architecture.norm_eps)),
        quantization=quantization,
        weight_format=weight_format(config),
        unread=unread,
    )


def _whole(config: Mapping[str, Any], named: str, name: str) -> ModelShape:
    """A model of layers that are planned as wholes, and run by Transformers where it can."""
    quantization, unread = _quantization(config)
    if quantization is not None:
        unread = f"weights in {weight_format(config)} are read for kernels here alone"
    format_, dtype = weight_format(config), _text(config)
    if named in PLANNED:
        layers = PLANNED[named](config)
        return ModelShape(
            **_ends(config, config, layers[0].hidden_size),
            name=name,
            architecture=named,
            every_layer=layers,
            norm_eps=1e-6,
            weight_format=format_,
            unread=unread,
            backend=Backend.PLANNING,
            unrun="neither kernels here nor Transformers have its layers",
        )
    known = described(config)
    text = dict(dtype) | {
        "vocab_size": known.vocab_size,
        "tie_word_embeddings": known.is_tied,
        "max_position_embeddings": known.max_positions,
    }
    return ModelShape(
        **_ends(config, text, known.hidden_size),
        name=name,
        architecture=named,
        every_layer=known.layers,
        norm_eps=1e-6,  # its modules know theirs
        weight_format=format_,
        unread=unread,
        backend=Backend.PLANNING if known.refusal else Backend.TRANSFORMERS,
        unrun=known.refusal,
        counted=Counted(all=known.num_parameters, text=known.num_text_parameters),
    )


def _ends(config: Mapping[str, Any], text: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """What stands around the layers, by the fields of the text decoder."""
    hidden, vocab = Dim(hidden_size), Dim(positive(text, "vocab_size"))
    embedding = TensorPart("model.embed_tokens", vocab)
    head = embedding if text.get("tie_word_embeddings", False) else TensorPart("lm_head", vocab)
    return {
        "embedding": LinearSpec(name="embedding", cut=Cut.REPLICATED, parts=(embedding,), inputs=hidden),
        "final_norm": NormSpec("model.norm", hidden),
        "head": LinearSpec(name="head", cut=Cut.COLUMN, parts=(head,), inputs=hidden),
        "max_positions": longest_prompt(text),
        "dtype": _dtype(config, text),
        "config": dict(config),
    }


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text decoder: those of the wrapper where none are nested."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _quantization(config: Mapping[str, Any]) -> tuple[Quantization | None, str | None]:
    """How the checkpoint's linears are quantized, or why that cannot be read."""
    try:
        return quantization_of(config), None
    except UnreadFormatError as error:
        return None, str(error)


def _layers(layers: Sequence[LayerSpec], quantization: Quantization | None) -> tuple[LayerSpec, ...]:
    """The layers, each with the linears that the checkpoint keeps plain; equal ones are one object."""
    if quantization is None:
        return tuple(layers)
    group_size, alike = quantization.scale_columns, dict[LayerSpec, LayerSpec]()
    kept = (
        layer.keeping(_kept(layer, index, quantization), group_size=group_size) for index, layer in enumerate(layers)
    )
    return tuple(alike.setdefault(layer, layer) for layer in kept)


def _kept(layer: LayerSpec, index: int, quantization: Quantization) -> frozenset[str]:
    """Names of the linears that are plain; raises `UserError` where one is in parts of either kind."""
    kept = set()
    if layer.experts is not None and not layer.experts.tensors_of.is_stacked:
        first = [part.tensor for matrix in layer.experts.matrices(0) for part in matrix.parts]
        kept |= {EXPERTS} if all(quantization.keep(layer_prefix(index) + name) for name in first) else set()
    for linear in layer.linears:
        names = [layer_prefix(index) + part.tensor for part in linear.parts]
        plain = [name for name in names if quantization.keep(name)]
        if plain and len(plain) < len(names):
            raise UserError(FIELD, plain[0], f"is plain, so all of {', '.join(names)} must be")
        if plain:
            kept.add(linear.name)
    return frozenset(kept)


def _refuse_unsupported(config: Mapping[str, Any], architecture: Architecture) -> None:
    """Anything that would run and be wrong is refused here, by name."""
    layer_types = config.get("layer_types")
    if layer_types is not None and not isinstance(layer_types, list):
        raise UserError("layer_types", layer_types, "must be a list in config.json")
    activation = config.get("hidden_act", architecture.activation)
    if activation != architecture.activation:
        raise KernelsMissingError("hidden_act", activation, f"only {architecture.activation} is supported")


def _architecture(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    return str(found[0] if isinstance(found, list) and found else found)


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    found = next(
        (source[key] for source in (config, text) for key in ("dtype", "torch_dtype") if source.get(key)), None
    )
    if found is None and config.get(FIELD):
        found = "bfloat16"  # of what is not quantized, where nothing says it
    return plain_precision(str(found or "float32").removeprefix("torch.")).name

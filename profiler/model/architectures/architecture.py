"""What an architecture says of itself, and how its layers follow from types of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from db.errors import UserError
from profiler.model.fields import positive
from profiler.model.spec import LayerSpec
from profiler.model.tensors import AS_STORED, Folding

Config = Mapping[str, Any]
LayerOf = Callable[[Config, str], LayerSpec]
FULL, SLIDING = "full_attention", "sliding_attention"
MAX_LAYERS = 10_000
OF_LAYERS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Sizes that may differ from layer to layer: a list in the configuration, which Transformers does not read."""


def every_full(_config: Config, count: int) -> Sequence[str]:
    """All layers see all tokens before."""
    return (FULL,) * count


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What is its own: its layers, what stands around them, and defaults of fields that a configuration may leave out.

    layer: of a configuration and a type of layer. layer_types: of a configuration that does not list them, and how many
    layers it has; refined: of those types, what they leave out. example: fields of a small model, beside the usual ones
    of `tests.checkpoints`.
    """

    layer: LayerOf
    layer_types: Callable[[Config, int], Sequence[str]] = every_full
    refined: Callable[[Config, Sequence[str]], Sequence[str]] = lambda _config, types: types
    embedding_scale: Callable[[Config], float] = lambda _config: 1.0
    final_norm: Folding = AS_STORED
    activation: str = "silu"
    norm_eps: float = 1e-6
    tied: bool = False
    example: Mapping[str, Any] = field(default_factory=dict)

    def layers(self, config: Config) -> tuple[LayerSpec, ...]:
        """The decoder's layers; those that are alike are one object."""
        count = positive(config, "num_hidden_layers", most=MAX_LAYERS)
        types = config.get("layer_types")
        if types is None:
            types = self.layer_types(config, count)
        if not isinstance(types, Sequence) or isinstance(types, str) or len(types) < count:
            raise UserError("layer_types", types, f"must be a list of {count} in config.json, one a layer")
        made = cache(lambda kind, sizes: self.layer(dict(config) | dict(sizes), kind))
        kinds = self.refined(config, [str(kind) for kind in types[:count]])
        return tuple(made(kind, sizes) for kind, sizes in zip(kinds, _own_sizes(config, count), strict=True))


def _own_sizes(config: Config, count: int) -> list[tuple[tuple[str, Any], ...]]:
    """Of each layer the fields of `OF_LAYERS` that are lists, with its number."""
    lists = {name: config[name] for name in OF_LAYERS if isinstance(config.get(name), list)}
    if not lists:
        return [()] * count
    for name, values in lists.items():
        if len(values) != count:
            raise UserError(name, f"{len(values)} numbers", f"must be one, or one for each of {count} layers")
    if config.get("head_dim") is None:
        raise UserError("head_dim", None, "must be given where layers differ")
    return [tuple(zip(lists, sizes, strict=True)) for sizes in zip(*lists.values(), strict=True)]

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
        made = cache(lambda kind: self.layer(config, kind))
        return tuple(made(kind) for kind in self.refined(config, [str(kind) for kind in types[:count]]))

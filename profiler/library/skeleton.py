"""A model of Transformers on the meta device: its decoder, its layers, its ends; no number is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from db.errors import UserError
from profiler.library.found import Found


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The parts of a model. The decoder is the module whose children are the layers."""

    model: Any
    decoder: Any
    layers: torch.nn.ModuleList

    @property
    def embedding(self) -> Any:
        """Token ids to hidden states."""
        return self.decoder.get_input_embeddings()

    @property
    def head(self) -> Any:
        """Hidden states to logits; None where the model has none."""
        return self.model.get_output_embeddings()

    def parameters_of(self, module: Any) -> int:
        """Numbers in a module's parameters, tied ones once."""
        return sum(parameter.numel() for parameter in module.parameters())


def build(found: Found, *, dtype: torch.dtype = torch.bfloat16) -> Skeleton:
    """The model on the meta device; raises `UserError` where the library cannot build it, or it has other parts."""
    architecture = found.model_class.__name__
    model, reason = None, ""
    for attention in ("sdpa", "eager"):  # the first that the class has
        try:
            with torch.device("meta"):
                model = found.model_class._from_config(found.config, dtype=dtype, attn_implementation=attention)
            break
        except Exception as error:  # whatever the library says of a configuration that it builds nothing of
            reason = " ".join(str(error).split())[:200]
    if model is None:
        raise UserError("architectures", architecture, f"cannot be built by Transformers: {reason}")
    decoder: Any = model
    for _ in range(4):
        layers = _layers_of(decoder, found.num_layers)
        if layers is not None:
            return Skeleton(model.eval(), decoder, layers)
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        decoder = inner if inner is not None and inner is not decoder else getattr(decoder, "model", None)
        if decoder is None:
            break
    raise UserError("architectures", architecture, "has no list of decoder layers")


def _layers_of(module: Any, count: int) -> torch.nn.ModuleList | None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count and name != "experts":
            return child
    return None

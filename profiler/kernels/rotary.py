"""Rotary frequencies of a configuration, scaled as Transformers scales them, always in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from profiler.model import ModelShape
from profiler.model.rope import rope_type


class Rotary:
    """Gives cos and sin for positions. Frequencies stay in float32: rounding them to bfloat16 breaks long contexts."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        self.inv_freq, self.scaling = _frequencies(shape)
        self.inv_freq = self.inv_freq.to(device)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [T] -> cos, sin [T, head_dim / 2] in `dtype`."""
        angles = positions.float()[:, None] * self.inv_freq
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def _frequencies(shape: ModelShape) -> tuple[torch.Tensor, float]:
    config: dict[str, Any] = dict(shape.config)
    kind = rope_type(config)
    if kind == "yarn":
        return _transformers_frequencies(config)
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    head_dim = shape.layers[0].attention.head_dim
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "linear":
        return inv_freq / parameters["factor"], 1.0
    return (_stretch_long_waves(inv_freq, parameters) if kind == "llama3" else inv_freq), 1.0


def _stretch_long_waves(inv_freq: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: waves longer than the first context are stretched, short ones kept, a ramp between."""
    length, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    share = (length / wavelength - low) / (high - low)
    ramp = (1 - share) * inv_freq / factor + share * inv_freq
    stretched = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
    return torch.where((wavelength <= length / low) & (wavelength >= length / high), ramp, stretched)


def _transformers_frequencies(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Taken from Transformers, whose import takes seconds: only for what is not written above."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model_config = AutoConfig.for_model(**config)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type(config)](model_config, torch.device("cpu"))
    return inv_freq, float(scaling)

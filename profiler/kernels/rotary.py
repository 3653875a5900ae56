"""Rotary frequencies of a configuration, scaled as Transformers scales them, always in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from profiler.model import ModelShape
from profiler.model.rope import Rotation, rope_parameters, rope_type, yarn_scale

Turns = Mapping[Rotation, tuple[torch.Tensor, torch.Tensor]]
"""Cosine and sine [T, head_dim / 2] for each way in which layers of a model turn."""


class Rotary:
    """Gives cos and sin for positions. Frequencies stay in float32: rounding them to bfloat16 breaks long contexts."""

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        attentions = [layer.attention for layer in shape.layer_kinds]
        of_rotation = {attention.rotation: attention.turned_dim for attention in attentions}
        self.frequencies = {
            rotation: tuple(part.to(device) for part in _frequencies(shape.config, rotation, head_dim))
            for rotation, head_dim in of_rotation.items()
        }

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> Turns:
        """positions: [T] -> cos, sin [T, head_dim / 2] in `dtype`."""
        turns = {}
        for rotation, (inv_freq, scaling) in self.frequencies.items():
            angles = positions.float()[:, None] * inv_freq
            turns[rotation] = (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
        return turns


def _frequencies(config: Mapping[str, Any], rotation: Rotation, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[head_dim / 2] radians a position, 0 for features that are not turned, and what lengths are multiplied with."""
    turned = head_dim if rotation.features is None else rotation.features
    inv_freq, scaling = torch.zeros(head_dim // 2), torch.ones(head_dim // 2)
    if not rotation.is_off:
        inv_freq[: turned // 2], scaling[: turned // 2] = _turned(config, rotation.layer_type, turned)
    return inv_freq, scaling


def _turned(config: Mapping[str, Any], layer_type: str, turned: int) -> tuple[torch.Tensor, float]:
    kind, parameters = rope_type(config, layer_type), rope_parameters(config, layer_type)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "yarn":
        return _yarn(config, parameters, theta, turned)
    inv_freq = 1.0 / theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)
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


def _yarn(
    config: Mapping[str, Any], parameters: Mapping[str, Any], theta: float, turned: int
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023): waves of fewer than beta_slow turns within the first context are stretched, those of
    more than beta_fast kept, a ramp between; and what lengths are multiplied with."""
    factor = parameters["factor"]
    length = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    waves = theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)

    def feature(turns: float) -> float:
        return turned * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature(parameters.get("beta_fast") or 32), feature(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(turned // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    inv_freq = 1.0 / (factor * waves) * (1 - kept) + 1.0 / waves * kept
    scaling = parameters.get("attention_factor")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scaling is None:
        scaling = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim) if mscale and all_dim else yarn_scale(factor)
    return inv_freq, float(scaling)

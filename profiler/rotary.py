"""Rotary frequencies of a configuration, scaled as Transformers scales them, always in float32."""

from __future__ import annotations

from typing import Any

import torch

from profiler.model import ModelShape, rope_type


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
    if rope_type(config) == "default":
        parameters = config.get("rope_parameters") or {}
        theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        return 1.0 / theta**exponents, 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model_config = AutoConfig.for_model(**config)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type(config)](model_config, torch.device("cpu"))
    return inv_freq, float(scaling)

"""What a checkpoint is quantized to and how ranges are chosen, and how a configuration tells it to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from profiler.kernels.quantized.weight import Observer
from profiler.model.precision import INT8, Format, LinearFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationRecipe:
    """How to quantize the linears of all layers.

    smooth: the strength of SmoothQuant (0.5: ranges of activations and weights meet in the middle); None: none.
    asymmetric: static int8 ranges from the least to the largest value, with an offset, instead of around zero.
    """

    linears: LinearFormat
    observer: Observer = Observer.MINMAX
    group_size: int | None = None
    smooth: float | None = None
    asymmetric: bool = False
    keep: tuple[str, ...] = ()
    kv: Format | None = None  # of keys and values, if not plain

    def keeps(self, name: str) -> bool:
        """Whether the linear `name` (model.layers.3.mlp.down_proj) stays plain: a pattern fits its name or its end."""
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in self.keep)

    @property
    def is_packed(self) -> bool:
        """Whether weights are written as packed words: what others read where activations stay plain."""
        return self.linears.activations is None

    def quantization_config(self, kept: Sequence[str], *, has_kv_scales: bool = False) -> dict[str, Any]:
        """The `quantization_config` of compressed-tensors; kept: names of linears that stay plain.

        has_kv_scales: whether each layer has a scale for its keys and one for its values.
        """
        cache: dict[str, Any] | None = None
        if self.kv is not None:
            cache = {
                "num_bits": 8, "type": "int" if self.kv == INT8 else "float", "symmetric": True, "strategy": "tensor",
                "dynamic": not has_kv_scales,
            }  # fmt: skip
        is_int = self.linears.weights == INT8
        numbers = {"num_bits": 8, "type": "int" if is_int else "float", "symmetric": True}
        weights = numbers | {
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
            "observer": "minmax",
        }
        activations: dict[str, Any] | None = None
        if self.linears.is_calibrated:
            activations = numbers | {"strategy": "tensor", "dynamic": False, "symmetric": not self.asymmetric}
        elif self.linears.activations is not None:
            activations = numbers | {"strategy": "token", "dynamic": True}
        file_format = "pack-quantized" if self.is_packed else "int-quantized" if is_int else "float-quantized"
        group = {
            "targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None,
            "format": file_format,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "format": file_format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *kept],
            "kv_cache_scheme": cache,
            "global_compression_ratio": None,
        }

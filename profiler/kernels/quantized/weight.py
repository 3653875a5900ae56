"""The weight of a linear in 8 bits: values and scales, made from plain numbers by one of several observers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from profiler.kernels.quantized.rounding import LARGEST, rounded, scales_of, widened

_SHRINKS = tuple(1.0 - 0.02 * step for step in range(1, 26))  # ranges that `MSE` tries, as shares of the whole
_PERCENTILE = 0.9999


class Observer(StrEnum):
    """How the end of a range is chosen from the numbers seen."""

    MINMAX = "minmax"  # the largest magnitude
    PERCENTILE = "percentile"  # all but one in ten thousand of them are inside
    MSE = "mse"  # the least mean square error


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K]: values times scales, of all K inputs (G = 1) or of K / G inputs after one another."""

    values: torch.Tensor  # [N, K] int8 or float8_e4m3fn
    scales: torch.Tensor  # [N, G] float32

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain weight [N, K]."""
        n, k = self.values.shape
        groups = self.scales.shape[1]
        return (widened(self.values).view(n, groups, k // groups) * self.scales[..., None]).view(n, k).to(dtype)


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype, *, group_size: int | None = None, observer: Observer = Observer.MINMAX
) -> QuantizedWeight:
    """weight [N, K] with a scale for each output, or for each group of `group_size` of its inputs."""
    n, k = weight.shape
    groups = weight.float().view(n, -1, group_size or k)
    scales = scales_of(ends_of(groups, dtype, observer), dtype)
    values = rounded(groups / scales[..., None], dtype)
    return QuantizedWeight(values.view(n, k), scales)


def ends_of(x: torch.Tensor, dtype: torch.dtype, observer: Observer) -> torch.Tensor:
    """The magnitude at which the range of x [..., K] ends, for each of its rows: [...]."""
    magnitudes = x.abs()
    largest = magnitudes.amax(dim=-1)
    match observer:
        case Observer.MINMAX:
            return largest
        case Observer.PERCENTILE:
            rank = max(1, round(_PERCENTILE * x.shape[-1]))
            return magnitudes.kthvalue(rank, dim=-1).values
        case Observer.MSE:
            return _least_squares(x, largest, dtype)


def _least_squares(x: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    best_ends, best = largest, _error(x, largest, dtype)
    for share in _SHRINKS:
        ends = largest * share
        error = _error(x, ends, dtype)
        best_ends, best = torch.where(error < best, ends, best_ends), torch.minimum(error, best)
    return best_ends


def _error(x: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scales = scales_of(ends, dtype)[..., None]
    limit = LARGEST[dtype]
    return (widened(rounded((x / scales).clamp_(-limit, limit), dtype)) * scales - x).square().sum(dim=-1)

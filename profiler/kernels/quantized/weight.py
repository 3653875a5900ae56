"""The weight of a linear in 8 bits: values and scales, made from plain numbers by one of several observers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from profiler.kernels.quantized.rounding import LARGEST, rounded, scales_of, widened

_SHRINKS = tuple(1.0 - 0.02 * step for step in range(1, 26))  # ranges that `MSE` tries, as shares of the whole
_PERCENTILE = 0.9999
_BLOCK_NUMBERS = 1 << 24


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

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some of its outputs."""
        return QuantizedWeight(self.values[rows], self.scales[rows])

    def error(self, weight: torch.Tensor) -> float:
        """The sum of squares by which it differs from a plain weight [N, K]."""
        blocks = range(0, weight.shape[0], max(1, _BLOCK_NUMBERS // weight.shape[1]))
        step = blocks.step
        parts = (slice(first, first + step) for first in blocks)
        return sum(float((self.rows(part).dequantized(torch.float32) - weight[part]).square().sum()) for part in parts)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The plain weight [N, K]."""
        n, k = self.values.shape
        groups = self.scales.shape[1]
        return (widened(self.values).view(n, groups, k // groups) * self.scales[..., None]).view(n, k).to(dtype)


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype, *, group_size: int | None = None, observer: Observer = Observer.MINMAX
) -> QuantizedWeight:
    """weight [N, K] with a scale for each output, or for each group of `group_size` of its inputs."""
    k = weight.shape[1]
    parts = []
    for rows in weight.split(max(1, _BLOCK_NUMBERS // k)):  # what is held in between stays small
        groups = rows.float().reshape(rows.shape[0], -1, group_size or k)
        scales = scales_of(ends_of(groups, dtype, observer), dtype)
        parts.append((rounded(groups / scales[..., None], dtype).view(-1, k), scales))
    if len(parts) == 1:
        return QuantizedWeight(*parts[0])
    return QuantizedWeight(torch.cat([values for values, _ in parts]), torch.cat([scales for _, scales in parts]))


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

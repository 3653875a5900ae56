"""Numbers to 8 bits and back in torch's own operators: the meaning of every fused kernel, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from profiler.kernels.quantized.rows import QuantizedRows

# What the end of a range is scaled to. For int8 that is half of -128 to 127, as in compressed-tensors: the end itself
# becomes 127, half a step off, no more than any other number.
LARGEST: Mapping[torch.dtype, float] = MappingProxyType({torch.int8: 127.5, torch.float8_e4m3fn: 448.0})
LEAST = 1e-12  # a row of zeros has a scale, too
ROUNDER = 12582912.0  # 1.5 * 2^23: adding it to a small float32 leaves no bits for a fraction


def scales_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales of numbers whose largest magnitudes are given, in float32."""
    return largest.float().clamp_min(LEAST) / LARGEST[dtype]


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """x [T, K] with a scale of its own for each row: its largest magnitude becomes the format's largest."""
    wide = x.float()
    scales = scales_of(wide.abs().amax(dim=-1, keepdim=True), dtype)
    return QuantizedRows(rounded(wide / scales, dtype), scales, x.dtype)


def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: float, dtype: torch.dtype) -> QuantizedRows:
    """x [T, K] in a range known beforehand: scale [1] float32; what lies outside becomes the end of the range."""
    return QuantizedRows(rounded(x.float() / scale + offset, dtype), scale, x.dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values of an 8-bit format, ties to even; x is float32 and may be overwritten."""
    if dtype == torch.int8:
        return x.clamp_(-128.0, 127.0).round_().to(torch.int8)
    return x.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def widened(values: torch.Tensor) -> torch.Tensor:
    """8-bit values as float32, exactly.

    Torch converts float8 on a CPU number by number. Its bits are those of a float16 whose exponent counts from 8 less,
    subnormal numbers included, and float16 is converted by vector instructions; NaN, which no checked weight holds,
    becomes 480.
    """
    if values.dtype == torch.float8_e4m3fn and values.device.type == "cpu":
        bits = values.view(torch.int8).to(torch.int16)  # the sign is extended to the upper byte
        halves = bits.bitwise_and(0x7F).bitwise_left_shift_(7).bitwise_or_(bits.bitwise_and_(-0x8000))
        return halves.view(torch.float16).float().mul_(256.0)
    return values.float()

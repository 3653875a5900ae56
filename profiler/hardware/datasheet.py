"""Published figures of devices: peak FLOP/s (for MFU) and number of multiprocessors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Dense FLOP/s in (float16 and bfloat16, float32 without TF32, int8, float8), from NVIDIA's data sheets; longer names
# first. None where the card has no such products.
_PEAKS = {
    "H200": (989.5e12, 67e12, 1979e12, 1979e12),
    "H100 PCIe": (756e12, 51e12, 1513e12, 1513e12),
    "H100 NVL": (835.5e12, 60e12, 1671e12, 1671e12),
    "H100": (989.5e12, 67e12, 1979e12, 1979e12),
    "H800": (989.5e12, 67e12, 1979e12, 1979e12),
    "H20": (148e12, 44e12, 296e12, 296e12),
    "B200": (2250e12, 80e12, 4500e12, 4500e12),
    "A100": (312e12, 19.5e12, 624e12, None),
    "A800": (312e12, 19.5e12, 624e12, None),
    "L40S": (362e12, 91.6e12, 733e12, 733e12),
    "L40": (181e12, 90.5e12, 362e12, 362e12),
    "L4": (121e12, 30.3e12, 242.5e12, 242.5e12),
    "A10G": (70e12, 35e12, 140e12, None),
    "A10": (125e12, 31.2e12, 250e12, None),
    "A6000": (154.8e12, 38.7e12, 309.7e12, None),
    "V100": (125e12, 15.7e12, None, None),
    "T4": (65e12, 8.1e12, 130e12, None),
}

# Streaming multiprocessors of Hopper cards: cuDNN attention runs in waves of them, as measured on the H100.
_MULTIPROCESSORS = {"H200": 132, "H100 PCIe": 114, "H100 NVL": 132, "H100": 132, "H800": 132}


def published_peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s that the vendor publishes for dense products in `dtype`; None where none is known (any CPU)."""
    half, single, int8, float8 = _find(_PEAKS, device_name) or (None, None, None, None)
    peaks = {"bfloat16": half, "float16": half, "float32": single, "int8": int8, "float8_e4m3fn": float8}
    return peaks.get(dtype)


def published_multiprocessors(device_name: str) -> int | None:
    """How many multiprocessors the device has; None where none is known."""
    return _find(_MULTIPROCESSORS, device_name)


def _find(table: Mapping[str, T], device_name: str) -> T | None:
    """The entry whose name is part of the device's, in whole words; the first that is."""
    words = f" {device_name.replace('-', ' ').upper()} "
    return next((entry for name, entry in table.items() if f" {name.upper()} " in words), None)

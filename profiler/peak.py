"""The published peak of a device: what MFU is measured against."""

from __future__ import annotations

# Dense FLOP/s in (float16 and bfloat16, float32 without TF32), from NVIDIA's data sheets; longer names first.
_PEAKS = {
    "H200": (989.5e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835.5e12, 60e12),
    "H100": (989.5e12, 67e12),
    "H800": (989.5e12, 67e12),
    "H20": (148e12, 44e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "A6000": (154.8e12, 38.7e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def published_peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s that the vendor publishes for dense products in `dtype`; None where none is known (any CPU)."""
    words = device_name.replace("-", " ").upper()
    for name, (half, single) in _PEAKS.items():
        if f" {name.upper()} " in f" {words} ":
            return half if dtype in ("bfloat16", "float16") else single if dtype == "float32" else None
    return None

"""Rows to keep."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from db.rows.hardware import Hardware
from db.rows.measurements import Measurement

NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def make_hardware(**changed: Any) -> Hardware:
    fields: dict[str, Any] = {
        "device": "Example CPU",
        "device_count": 2,
        "memory_bytes": 8 * 2**30,
        "driver": "6.1",
        "torch_version": "2.13.0",
        "backend": "gloo",
        "num_threads": 1,
        "link": "shared memory",
    }
    return Hardware(**(fields | changed))


def make_measurement(m: int = 64, *, minutes: float = 0, **changed: Any) -> Measurement:
    fields: dict[str, Any] = {
        "op": "matmul",
        "dtype": "float32",
        "shape": {"m": m, "n": 512, "k": 256},
        "num_samples": 20,
        "median_us": 10.125,
        "p10_us": 9.5,
        "p90_us": 12.75,
        "min_us": 9.0,
        "std_us": 0.3,
        "noisy": False,
        "measured_at": NOON + timedelta(minutes=minutes),
        "code_version": "0.1.0+abc",
    }
    return Measurement(**(fields | changed))

"""Which precisions a device has kernels for."""

from __future__ import annotations

import torch

from db.errors import UserError
from profiler.model import PRECISIONS, Precision
from profiler.model.precision import E4M3

# Compute capability from which a card multiplies such numbers.
_SINCE = {"int8": (7, 5), "float8_e4m3fn": (8, 9)}


def check_precision(precision: Precision, device_type: str, *, field: str = "dtype") -> None:
    """Raise `UserError` that says what the device has, where it has no kernels for `precision`."""
    if device_type != "cuda" or (precision.linears is None and not precision.has_kv_scales):
        return
    capability = torch.cuda.get_device_capability()
    if not _has(precision, capability):
        having = ", ".join(name for name, each in PRECISIONS.items() if "+" not in name and _has(each, capability))
        raise UserError(field, precision.name, f"{torch.cuda.get_device_name()} has kernels for {having}")


def _has(precision: Precision, capability: tuple[int, int]) -> bool:
    """Weights that are only dequantized are read as bytes and need no products of their kind."""
    products = (0, 0) if precision.linears is None else _SINCE.get(precision.products.name, (0, 0))
    return capability >= max(products, _SINCE["float8_e4m3fn"] if precision.kv == E4M3 else (0, 0))

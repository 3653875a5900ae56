"""Fields of a configuration, checked as they are read: an error names the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.errors import UserError

MAX_SIZE = 2**30
_MAX_NUMBER = 1e15


class KernelsMissingError(UserError):
    """What kernels here do not compute; Transformers may."""


def positive(config: Mapping[str, Any], field: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
    """An integer of at least 1."""
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(field, value, "must be a positive integer in config.json")
    if value > most:
        raise UserError(field, value, f"must be at most {most}")
    return value


def positive_number(field: str, value: object) -> float:
    """A number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_NUMBER:
        raise UserError(field, value, f"must be a number above 0, at most {_MAX_NUMBER:g}, in config.json")
    return float(value)

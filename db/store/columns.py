"""Column types of our own: UTC times, shapes as canonical text, closed vocabularies as plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import DateTime, Dialect, Enum, String
from sqlalchemy.types import TypeDecorator

from db.errors import cut

_SHAPE_NAME = re.compile(r"[a-z][a-z0-9_]*")


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time: aware in Python, UTC in the database, on SQLite (which keeps no zone) and PostgreSQL alike."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Attach UTC where the database dropped it."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ShapeText(TypeDecorator[Mapping[str, int]]):
    """A shape such as {"m": 512, "k": 4096} kept as "k=4096,m=512": it can be compared, indexed and read by eye."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, int] | None, dialect: Dialect) -> str | None:
        """Write the canonical text."""
        return None if value is None else shape_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, int] | None:
        """Read it back as a mapping."""
        return None if value is None else parse_shape(value)


def shape_text(shape: Mapping[str, int]) -> str:
    """Canonical text of a shape: `name=value` sorted by name; equal shapes give equal texts.

    Raises ValueError for a name that is not lower-case letters, digits and underscores.
    """
    for name in shape:
        if not _SHAPE_NAME.fullmatch(name):
            raise ValueError(f"shape name {cut(name)!r} must match {_SHAPE_NAME.pattern}")
    return ",".join(f"{name}={int(shape[name])}" for name in sorted(shape))


def parse_shape(text: str) -> dict[str, int]:
    """The inverse of `shape_text`."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return {name: int(value) for name, value in pairs}


def word_column(vocabulary: type[StrEnum]) -> Enum:
    """A column for a string enumeration, stored as text; a new member needs no migration."""

    def words(enum: type[Any]) -> list[str]:
        return [member.value for member in enum]

    return Enum(vocabulary, native_enum=False, length=32, values_callable=words)

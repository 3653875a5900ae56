"""Parses untrusted JSON text: valid JSON that cannot be used (infinite numbers, deep nesting) is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from db.errors import UserError, cut

MAX_DEPTH = 64
MAX_PARTS = 1_000_000
"""Objects and lists in one text: a pair of brackets takes 64 bytes of memory and more."""
MAX_INTEGER = 2**63 - 1
MAX_KEYS = 300_000
"""Of one object: the index of the largest checkpoints names some 100,000 tensors."""


def parse_json(data: bytes, field: str, path: str | Path) -> Any:
    """Parse the bytes of a file or a line; refuses repeated keys, infinite numbers, deep nesting, lone surrogates."""
    if data.count(b"[") + data.count(b"{") > MAX_PARTS:
        raise UserError(field, path, f"must be JSON of at most {MAX_PARTS} objects and lists")
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(field, path, f"must be UTF-8 text (byte {error.start} is not)") from None
    except RecursionError:
        raise UserError(field, path, f"must be JSON nested at most {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise UserError(field, path, f"must be JSON ({error})") from None
    try:
        _check(content, MAX_DEPTH)
    except _UnusableError as error:
        where = key_path(reversed(error.keys))
        raise UserError(field, path, f"must be JSON {error.reason}{where and f' ({where})'}") from None
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys, at most {MAX_KEYS} are read")
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {cut(twice)!r} stands twice in one object")
    return content


class _UnusableError(Exception):
    """A value that no file may hold, and the keys that lead to it, the last one first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.keys: list[int | str] = []


def _check(value: Any, depth: int) -> None:
    """Raise unless numbers are finite and of usual size, texts can be encoded, and nesting is at most `depth` deep."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _UnusableError("with finite numbers alone")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise _UnusableError("with whole numbers of at most 64 bits")
    if isinstance(value, str):
        _check_text(value)
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise _UnusableError(f"nested at most {MAX_DEPTH} deep")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(key, str):
            _check_text(key)
        try:
            _check(item, depth - 1)
        except _UnusableError as error:
            error.keys.append(key)
            raise


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _UnusableError("without lone surrogates in its texts") from None


def key_path(keys: Iterable[int | str]) -> str:
    """A path of keys as text: `rounds[3][0].start`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{cut(key, 40)}" for key in keys).removeprefix(".")

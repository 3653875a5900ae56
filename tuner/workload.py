"""Workloads: requests read from a JSONL trace, one object a line, as the Mooncake traces are published."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from db.errors import UserError
from tuner.plan import Request, finite


def load_workload(path: str | Path, *, rate: float = 1.0, limit: int | None = None) -> list[Request]:
    """Read requests from a JSONL trace, ordered by arrival, the first of them arriving at 0.

    A line has `input_length` (tokens) and may have `timestamp` (ms), `id`, `cached_tokens`, `weight` and
    `sla_ttft_s`; other fields are ignored. `rate` makes requests arrive that many times faster; `limit` keeps only so
    many. Raises UserError naming the line and field.
    """
    if not (math.isfinite(rate) and rate > 0.0):
        raise UserError("rate", rate, "a finite number above 0 (2 makes requests arrive twice as fast)")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(str(path), error.strerror or "unreadable", "a readable JSONL file is needed") from error
    except UnicodeDecodeError as error:
        raise UserError(str(path), "not text", "a JSONL file in UTF-8 is needed") from error
    entries = [(number, _entry(number, line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise UserError(str(path), "empty", "at least one request (one JSON object a line) is needed")
    entries.sort(key=lambda item: _number(item[0], item[1], "timestamp", 0.0))
    first_ms = _number(*entries[0], "timestamp", 0.0)
    return [_request(number, entry, first_ms, rate) for number, entry in entries[:limit]]


def _entry(number: int, line: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"line {number}", error, "a JSON object is needed") from error
    except RecursionError as error:
        raise UserError(f"line {number}", "nested too deeply", "a JSON object is needed") from error
    if not isinstance(entry, dict):
        raise UserError(f"line {number}", line.strip()[:40], "a JSON object is needed")
    return entry


def _request(number: int, entry: Mapping[str, Any], first_ms: float, rate: float) -> Request:
    sla = entry.get("sla_ttft_s")
    try:
        return Request(
            id=str(entry.get("id", f"r{number - 1}")),
            prompt_tokens=_whole(number, entry, "input_length", None),
            cached_tokens=_whole(number, entry, "cached_tokens", 0),
            arrival_s=(_number(number, entry, "timestamp", 0.0) - first_ms) / 1e3 / rate,
            weight=_number(number, entry, "weight", 1.0),
            sla_ttft_s=None if sla is None else _number(number, entry, "sla_ttft_s", 0.0),
        )
    except UserError as error:
        field = "input_length" if error.field == "prompt_tokens" else error.field
        raise UserError(
            field if field.startswith("line ") else f"line {number}: {field}", error.value, error.allowed
        ) from None


def _number(number: int, entry: Mapping[str, Any], name: str, default: float) -> float:
    value = entry.get(name, default)
    found = finite(value)
    if found is None:
        raise UserError(f"line {number}: {name}", value, "a finite number is needed")
    return found


def _whole(number: int, entry: Mapping[str, Any], name: str, default: int | None) -> int:
    value = entry.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"line {number}: {name}", "missing" if value is None else value, "a whole number is needed")
    return value

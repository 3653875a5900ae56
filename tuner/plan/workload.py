"""Workloads: requests read from a JSONL trace, one object a line, as the Mooncake traces are published."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from db.errors import UserError
from db.files.documents import located, read_json_lines
from tuner.plan.cost_model import MAX_SECONDS
from tuner.plan.plan import Request

_MAX_MS = MAX_SECONDS * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadLine:
    """A line of a trace; other fields are ignored."""

    input_length: int
    """Tokens of the prompt."""
    timestamp: float = 0.0
    """Milliseconds at which it arrives."""
    id: str | int | None = None
    cached_tokens: int = 0
    weight: float = 1.0
    sla_ttft_s: float | None = None

    def __post_init__(self) -> None:
        if not -_MAX_MS <= self.timestamp <= _MAX_MS:
            raise UserError("timestamp", self.timestamp, f"a number of milliseconds up to {_MAX_MS:g} is needed")


def load_workload(path: str | Path, *, rate: float = 1.0, limit: int | None = None) -> list[Request]:
    """Read requests from a JSONL trace (`WorkloadLine`), ordered by arrival, the first of them arriving at 0.

    `rate` makes requests arrive that many times faster; `limit` keeps only so many. Raises UserError naming the line
    and field.
    """
    if not (math.isfinite(rate) and rate > 0.0):
        raise UserError("rate", rate, "a finite number above 0 (2 makes requests arrive twice as fast)")
    lines = read_json_lines(path, WorkloadLine, field="workload")
    if not lines:
        raise UserError("workload", path, "must have at least one request (one JSON object a line)")
    lines.sort(key=lambda line: line.content.timestamp)
    first_ms = lines[0].content.timestamp
    requests = []
    for number, place, entry in lines[:limit]:
        with located(place):
            requests.append(_request(f"r{number - 1}", entry, (entry.timestamp - first_ms) / 1e3 / rate))
    return requests


def _request(name: str, line: WorkloadLine, arrival_s: float) -> Request:
    try:
        return Request(
            id=name if line.id is None else str(line.id),
            prompt_tokens=line.input_length,
            cached_tokens=line.cached_tokens,
            arrival_s=arrival_s,
            weight=line.weight,
            sla_ttft_s=line.sla_ttft_s,
        )
    except UserError as error:
        names = {"prompt_tokens": "input_length", "arrival_s": "timestamp"}
        raise UserError(names.get(error.field, error.field), error.value, error.allowed) from None

"""A trace as it is read: its format found from its first line, one entry a request, and the unit of its times.

| format | file | times | fields |
| --- | --- | --- | --- |
| mooncake | JSON lines | ms | input_length, timestamp, output_length, hash_ids (blocks of 512 tokens) |
| bailian | JSON lines | s | the same and chat_id, parent_chat_id, type, turn; hash_ids of 16 tokens |
| azure | CSV | dates | TIMESTAMP, ContextTokens, GeneratedTokens (2023 and 2024) |
| burstgpt | CSV | s | Timestamp, Request tokens, Response tokens, and more |

Lines of the first kind may also have id, cached_tokens, weight, priority, sla_ttft_s and sla_tpot_s of our own, and
session_id with delay, the think time in ms since the session's turn before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from db.errors import UserError, cut
from db.files.documents import Line, located, read_json_lines
from db.files.numbers import whole_number
from db.files.tables import first_line, read_csv
from tuner.plan.stage_cost import MAX_TOKENS
from tuner.workload.trace_format import UNITS, TimeUnit, TraceFormat

FIELD = "--workload"
_INPUT_LENGTH = re.compile(r'"input_length"\s*:')
_CHAT_ID = re.compile(r'"chat_id"\s*:(?!\s*null)')
MAX_TIME = 1e16
"""Of a time in a trace, in whatever unit: microseconds since 1970 are below it."""
LIKELY_GAP_S = (1e-3, 86_400.0)
"""Mean seconds between requests that a trace of one service is believed to have."""
FEWEST_TIMES = 8
"""Requests from which their rate tells the unit of their times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadLine:
    """A line of a trace of JSON lines; other fields are ignored."""

    input_length: int
    """Tokens of the prompt."""
    timestamp: float | None = None
    """When it arrives, in milliseconds or the format's unit; left out: at 0, or after `delay`."""
    id: str | int | None = None
    cached_tokens: int | None = None
    weight: float = 1.0
    sla_ttft_s: float | None = None
    sla_tpot_s: float | None = None
    priority: str | int | None = None
    """Its class: a name or a number, whose weight `--priority` tells."""
    output_length: int | None = None
    """Tokens of the answer."""
    hash_ids: tuple[int | str, ...] | None = None
    """Blocks of the prompt, each named by a hash of all tokens up to its end."""
    session_id: str | int | None = None
    delay: float | None = None
    """Milliseconds, or the format's unit, of think time since the session's turn before."""
    chat_id: str | int | None = None

    def __post_init__(self) -> None:
        if self.input_length < 0:
            raise UserError("input_length", self.input_length, "at least 0")
        for name in ("timestamp", "delay"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= MAX_TIME:
                raise UserError(name, value, f"a number of at most {MAX_TIME:g} is needed")
        if self.delay is not None and self.delay < 0.0:
            raise UserError("delay", self.delay, "at least 0")


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's lines in the file's order, and what they are."""

    format: TraceFormat
    unit: TimeUnit
    lines: list[Line[WorkloadLine]]
    unit_source: str
    """Why the times have this unit, for people."""


def read_trace(
    path: str | Path,
    *,
    format: TraceFormat | None = None,
    unit: TimeUnit | None = None,
    most_lines: int | None = None,
) -> Trace:
    """Read a trace; what is not given is found from the file, or refused with the option that gives it."""
    found = format or _format_of(path)
    reader: Callable[[], list[Line[WorkloadLine]]] = {
        TraceFormat.AZURE: lambda: _read_csv(
            path, most_lines, "TIMESTAMP", _date_s, "ContextTokens", "GeneratedTokens"
        ),
        TraceFormat.BURSTGPT: lambda: _read_csv(
            path, most_lines, "Timestamp", _number, "Request tokens", "Response tokens"
        ),
    }.get(found, lambda: read_json_lines(path, WorkloadLine, field=FIELD, most_lines=most_lines))
    lines = reader()
    if not lines:
        raise UserError(FIELD, path, "must have at least one request")
    if unit is not None and found is not TraceFormat.AZURE:
        return Trace(found, unit, lines, f"times in {unit.word}, as --time-unit says")
    return Trace(found, *_unit_of(path, found, lines))


def is_trace(path: str | Path, *, field: str = FIELD) -> bool:
    """Whether a file starts like a trace: with columns that a format has, or with an object that has input_length."""
    try:
        _format_of(path)
    except UserError as refused:
        if refused.field == FIELD:  # it cannot be read
            raise UserError(field, path, refused.allowed) from None
        return False
    line = first_line(path, field=field)
    return (bool(line) and not line.startswith("{")) or _INPUT_LENGTH.search(line) is not None


def _format_of(path: str | Path) -> TraceFormat:
    line = first_line(path, field=FIELD)
    is_no_line = line in ("{", "[") or line.startswith("[{")
    if is_no_line or (line and not line.startswith(("{", "[")) and "," not in line):
        allowed = "JSON lines, an object each, or CSV with the columns' names is needed"
        raise UserError(f"{FIELD} {cut(path)}: line 1", line, allowed)
    if "," in line and not line.startswith(("{", "[")):
        columns = {name.strip().strip('"').lower() for name in line.split(",")}
        if "contexttokens" in columns:
            return TraceFormat.AZURE
        if "request tokens" in columns:
            return TraceFormat.BURSTGPT
        allowed = f"names no columns of azure or burstgpt; say which it is with --workload-format {{{_names()}}}"
        raise UserError(f"{FIELD} {cut(path)}: line 1", line, allowed)
    return TraceFormat.BAILIAN if _CHAT_ID.search(line) else TraceFormat.MOONCAKE


def _names() -> str:
    return ",".join(TraceFormat)


def _unit_of(
    path: str | Path, format: TraceFormat, lines: list[Line[WorkloadLine]]
) -> tuple[TimeUnit, list[Line[WorkloadLine]], str]:
    """The format's unit, or seconds where only they are believable and the times look like seconds."""
    usual = UNITS[format]
    if format is TraceFormat.AZURE:
        return usual, lines, "times are dates"
    times = [line.content.timestamp for line in lines if line.content.timestamp is not None]
    if not times:
        delays = any(line.content.delay is not None for line in lines)
        return usual, lines, f"delays in {usual.word}, as {format} traces count" if delays else "without times"
    source = f"times in {usual.word}, as {format} traces count"
    span = max(times) - min(times)
    if len(times) < FEWEST_TIMES or span <= 0.0:
        return usual, lines, source
    gaps = {unit: span * unit.seconds / (len(times) - 1) for unit in TimeUnit}
    likely = [unit for unit in TimeUnit if LIKELY_GAP_S[0] <= gaps[unit] <= LIKELY_GAP_S[1]]
    if usual in likely:
        return usual, lines, source
    if likely == [TimeUnit.SECONDS] and not all(time.is_integer() for time in times):
        return (
            TimeUnit.SECONDS,
            lines,
            f"times in seconds: they have fractions, and in ms {1 / gaps[usual]:.3g} would come a second",
        )
    allowed = (
        f"would be a request every {gaps[usual]:.3g} s in {usual.word}, the unit of {format} traces; "
        "say which with --time-unit s or --time-unit ms"
    )
    raise UserError(f"{FIELD} {path}: timestamp", f"{min(times):g} to {max(times):g}", allowed)


def _read_csv(
    path: str | Path,
    most_lines: int | None,
    time_column: str,
    time_of: Callable[[str, str], float],
    input_column: str,
    output_column: str,
) -> list[Line[WorkloadLine]]:
    found = []
    for number, place, row in read_csv(path, field=FIELD, most_lines=most_lines):
        with located(place):
            for column in (time_column, input_column, output_column):
                if column not in row:
                    raise UserError(column, "missing", f"the first line must name it; it names {', '.join(row)}")
            line = WorkloadLine(
                input_length=_tokens(input_column, row[input_column]),
                timestamp=time_of(time_column, row[time_column]),
                output_length=_tokens(output_column, row[output_column]),
            )
        found.append(Line(number, place, line))
    return found


def _tokens(column: str, text: str) -> int:
    return whole_number(column, text.removesuffix(".0"), least=0, most=MAX_TOKENS)


def _number(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(column, text, "a number of seconds is needed")
    return value


def _date_s(column: str, text: str) -> float:
    """Seconds since 1970; without a zone it is UTC."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(column, text, "a date such as 2023-11-16 18:15:46.6805900 is needed") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()

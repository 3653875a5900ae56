"""Workloads: a trace's requests in order of arrival, what of them is cached, and how the file was read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from db.errors import UserError, cut
from db.files.documents import Line, located
from tuner.plan.plan import MAX_REQUESTS, Request
from tuner.workload.prefix_cache import PrefixCache
from tuner.workload.trace import FIELD, Trace, WorkloadLine, read_trace
from tuner.workload.trace_format import TimeUnit, TraceFormat

NO_CACHE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests ordered by arrival, the first of them at 0."""

    requests: tuple[Request, ...]
    output_tokens: tuple[int | None, ...]
    """Tokens of each request's answer, None where the trace does not say."""
    notes: tuple[str, ...]
    """How the trace was read, a sentence a line."""

    @property
    def hit_rate(self) -> float:
        """Share of all prompts' tokens that are cached."""
        return sum(r.cached_tokens for r in self.requests) / sum(r.prompt_tokens for r in self.requests)


def counted(count: int, noun: str) -> str:
    """So many of a thing."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def load_workload(
    path: str | Path,
    *,
    rate: float = 1.0,
    limit: int | None = None,
    format: TraceFormat | None = None,
    unit: TimeUnit | None = None,
    cache_tokens: int | None = None,
) -> Workload:
    """Read a trace in any of the formats of `tuner.workload.trace`.

    rate: requests arrive that many times faster. limit: only so many lines are read. format, unit: found from the file
    where they are None. cache_tokens: size of the prefix cache that `hash_ids` are looked up in, None for no limit,
    `NO_CACHE` for none. Raises UserError naming the line and field, or the option that settles it.
    """
    if not (math.isfinite(rate) and rate > 0.0):
        raise UserError("--rate", rate, "a finite number above 0 (2 makes requests arrive twice as fast)")
    trace = read_trace(path, format=format, unit=unit, most_lines=limit)
    arrival_s, notes = _arrivals_s(trace)
    empty = [line for line in trace.lines if not line.content.input_length]
    placed = [(at, line) for at, line in zip(arrival_s, trace.lines, strict=True) if line.content.input_length]
    if not placed:
        raise UserError(FIELD, path, "must have at least one request with an input_length above 0")
    if len(placed) > MAX_REQUESTS:
        allowed = f"at most {MAX_REQUESTS} can be planned; --num-requests N takes the first N"
        raise UserError(FIELD, f"{path} with {len(placed)} requests", allowed)
    given_s = [at for at, line in placed if line.content.timestamp is not None]
    early = sum(at < before for before, at in pairwise(given_s))
    if early:
        notes.append(f"Sorted by time: {counted(early, 'line')} came before the line above.")
    placed.sort(key=lambda pair: pair[0])
    names = _names([line for _, line in placed])
    if empty:
        notes.append(
            f"Skipped {len(empty)} of {counted(len(trace.lines), 'line')} whose prompt has no tokens, "
            f"the first in line {empty[0].number}."
        )
    first_s, last_s = placed[0][0], placed[-1][0]
    cache = None if cache_tokens == NO_CACHE else PrefixCache(cache_tokens, trace.format.block_tokens)
    requests = [
        _request(line, name, (at - first_s) / rate, cache) for name, (at, line) in zip(names, placed, strict=True)
    ]
    workload = Workload(
        requests=tuple(requests),
        output_tokens=tuple(line.content.output_length for _, line in placed),
        notes=(_summary(path, trace, len(placed), (last_s - first_s) / rate, rate), *notes),
    )
    hashed = any(line.content.hash_ids and line.content.cached_tokens is None for _, line in placed)
    if not hashed:
        return workload
    note = _cache_note(workload, cache_tokens, trace.format.block_tokens)
    return Workload(requests=workload.requests, output_tokens=workload.output_tokens, notes=(*workload.notes, note))


def _arrivals_s(trace: Trace) -> tuple[list[float], list[str]]:
    """When each line's request arrives, before any speeding up; a turn without a time comes `delay` after the one
    before it in its session."""
    step, thinking, nameless = trace.unit.seconds, 0, 0
    turn_s: dict[str | int | None, float] = {}
    arrivals = []
    for _, _, line in trace.lines:
        if line.timestamp is not None:
            at = line.timestamp * step
        else:
            at = turn_s.get(line.session_id, 0.0) + (line.delay or 0.0) * step
            thinking += line.delay is not None
            nameless += line.delay is not None and line.session_id is None
        if line.session_id is not None or line.delay is not None:
            turn_s[line.session_id] = at
        arrivals.append(at)
    notes = []
    if thinking:
        of = "one session, as no line names any," if nameless == thinking else counted(len(turn_s), "session")
        notes.append(
            f"{counted(thinking, 'turn')} of {of} arrive their delay after the turn before arrived; "
            "how long that turn takes is not known here."
        )
    return arrivals, notes


def _summary(path: str | Path, trace: Trace, count: int, span_s: float, rate: float) -> str:
    pace = f", {count / span_s:.3g} a second" if span_s > 0.0 else ", all at once"
    sped = f", sped up {rate:g} times" if rate != 1.0 else ""
    read = f"{counted(count, 'request')} over {span_s:.4g} s{pace}{sped} ({trace.unit_source})"
    return f"Read {cut(Path(path).name)} as {trace.format}: {read}."


def _cache_note(workload: Workload, cache_tokens: int | None, block_tokens: int) -> str:
    if cache_tokens == NO_CACHE:
        return "No prefix cache: hash_ids are not looked up."
    size = "without limit" if cache_tokens is None else f"of {cache_tokens} tokens"
    return f"Prefix cache {size}, blocks of {block_tokens}: {workload.hit_rate:.1%} of all prompt tokens are hits."


def _request(line: Line[WorkloadLine], name: str, arrival_s: float, cache: PrefixCache | None) -> Request:
    entry = line.content
    cached = entry.cached_tokens or 0
    if cache is not None and entry.hash_ids:
        hits = cache.hit_tokens(entry.hash_ids, entry.input_length)
        cached = hits if entry.cached_tokens is None else cached
    try:
        with located(line.place):
            return Request(
                id=name,
                prompt_tokens=entry.input_length,
                cached_tokens=cached,
                arrival_s=arrival_s,
                weight=entry.weight,
                sla_ttft_s=entry.sla_ttft_s,
                sla_tpot_s=entry.sla_tpot_s,
                priority=None if entry.priority is None else str(entry.priority),
            )
    except UserError as error:
        names = {"prompt_tokens": "input_length", "arrival_s": "timestamp"}
        field = error.field
        for ours, theirs in names.items():
            field = field.replace(ours, theirs)
        raise UserError(field, error.value, error.allowed) from None


def _names(lines: Sequence[Line[WorkloadLine]]) -> list[str]:
    """Each request's name: its `id`, its `chat_id` where no other has the same, or its line's number."""
    chats = Counter(line.content.chat_id for line in lines)
    line_of: dict[str, int] = {}
    for line in lines:
        given, chat = line.content.id, line.content.chat_id
        name = f"r{line.number - 1}" if chat is None or chats[chat] > 1 else str(chat)
        name = name if given is None else str(given)
        if name in line_of:
            with located(line.place):
                raise UserError("id", name, f"each request needs its own, and line {line_of[name]} has this one")
        line_of[name] = line.number
    return list(line_of)


def as_lines(requests: Sequence[Request]) -> list[WorkloadLine]:
    """Requests as lines of a trace that say the same."""
    return [
        WorkloadLine(
            id=request.id,
            input_length=request.prompt_tokens,
            timestamp=request.arrival_s * 1e3,
            cached_tokens=request.cached_tokens,
            weight=request.weight,
            sla_ttft_s=request.sla_ttft_s,
            sla_tpot_s=request.sla_tpot_s,
            priority=request.priority,
            output_length=request.output_tokens if request.output_tokens > 1 else None,
        )
        for request in requests
    ]

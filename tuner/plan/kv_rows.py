"""Assigns rows of the KV slab to the requests of a plan; rows of finished prompts are reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.plan.plan import Request, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRows:
    """The rows of all requests; each request's lie together, prompt first."""

    start: tuple[int, ...]
    """Row of each request's first token."""
    total: int
    """Rows of the slab."""


def assign_rows(
    requests: Sequence[Request],
    rounds: Sequence[Round],
    *,
    max_new_tokens: int,
    kept_tokens: Sequence[int] | None = None,
) -> KVRows:
    """Give each request the lowest rows that are free from its first round to its last.

    Rows are kept to the end by requests that decode, and from the start by those with cached tokens, which are written
    before the first round and once for all repetitions of the rounds.

    kept_tokens: prompt tokens of each request that have rows, if not all.
    """
    tokens = [request.prompt_tokens for request in requests] if kept_tokens is None else kept_tokens
    sizes = [count + max_new_tokens for count in tokens]
    spans = _spans(requests, rounds, decodes=max_new_tokens > 1)
    start = [0] * len(requests)
    held: list[tuple[int, int, int]] = []  # first row, row after the last, last round
    for index in sorted(range(len(requests)), key=lambda index: spans[index][0]):
        begins, ends = spans[index]
        held = sorted(entry for entry in held if entry[2] >= begins)
        size = sizes[index]
        start[index] = _first_gap(held, size)
        held.append((start[index], start[index] + size, ends))
    return KVRows(start=tuple(start), total=max(first + size for first, size in zip(start, sizes, strict=True)))


def _spans(requests: Sequence[Request], rounds: Sequence[Round], *, decodes: bool) -> list[tuple[int, int]]:
    """The first and the last round in which each request's rows are needed."""
    first, last = [len(rounds)] * len(requests), [0] * len(requests)
    for round_index, chunks in enumerate(rounds):
        for chunk in chunks:
            first[chunk.request] = min(first[chunk.request], round_index)
            last[chunk.request] = round_index
    return [
        (0 if request.cached_tokens else first[index], len(rounds) if decodes or request.cached_tokens else last[index])
        for index, request in enumerate(requests)
    ]


def _first_gap(held: Sequence[tuple[int, int, int]], size: int) -> int:
    """The lowest row before which nothing of `held`, in order of rows, is in the way of `size` rows."""
    row = 0
    for first, after, _ in held:
        if first - row >= size:
            break
        row = max(row, after)
    return row

"""`dp`: split each request best, then decide every round of the batch by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tuner.plan.cost_model import Ints
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats
from tuner.policies.sweep import Search, shortest_first
from tuner.rounds.packing.packer import Packer, backward_spans
from tuner.rounds.problem import Problem
from tuner.workload.objective import Objective

ROUNDING = 1e-9
BLOCK = 512
"""Chunks at which stretches begin that are looked at together."""


def dp_rounds(problem: Problem) -> list[Round]:
    """Sweep the cap on a round's time; under each, split requests best and group the chunks by `pack_line`.

    For another objective than the makespan, at most `max_makespan_increase` of the best makespan is given up.
    """
    search, order, flat = Search.of(problem), shortest_first(problem), [1.0] * len(problem.requests)
    pack = LinePacker()
    search.sweep(pack, order, flat, Objective.MAKESPAN)
    if problem.objective is not Objective.MAKESPAN:
        search.limit(problem.makespan_limit_s(search.ranked()[0].evaluation.makespan_s), problem.objective)
        search.sweep(pack, order, flat, problem.objective)
    return search.ranked()[0].rounds


def pack_line(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[Round]:
    """Cut each request best under its cap, then group the chunks of all into rounds by dynamic programming.

    Cut backwards with the longest chunks allowed, a request reads its context the fewest times (`rounds.bound` proves
    it), so that is its best split under a cap. The chunks then stand in a line: what each request has left at its
    front, least work first, then the full chunks, request after request. A round is a stretch of the line, at most
    the cap long; chunks of one request in it join. D(j) = min over i of D(i) + t(round of the chunks i..j) is the
    least total time of the first j chunks.
    """
    return _packed(_Line(packer, requests, _in_line(packer, requests, order, caps_s), caps_s))


class LinePacker:
    """`pack_line` of one batch in one order; under caps a little apart its rounds are the same, and are remembered."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, int, int], ...], list[tuple[float, float, list[Round]]]] = {}
        """The rounds of a line of chunks from one cap up to, but not at, another."""

    def __call__(
        self, packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
    ) -> list[Round]:
        """As `pack_line`."""
        chunks = _in_line(packer, requests, order, caps_s)
        if min(caps_s) < max(caps_s):
            return _packed(_Line(packer, requests, chunks, caps_s))
        known, cap_s = self._known.setdefault(tuple(chunks), []), caps_s[0] * (1.0 + ROUNDING)
        for least_s, end_s, rounds in known:
            if least_s <= cap_s < end_s:
                return rounds
        line = _Line(packer, requests, chunks, caps_s)
        rounds = _packed(line)
        known.append((line.longest_s, line.refused_s, rounds))
        return rounds


def _in_line(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[tuple[int, int, int]]:
    """(request, first token, end) of the chunks that requests are cut into, as they stand in line."""
    cuts = list(zip(order, backward_spans(packer, requests, order, caps_s), strict=True))
    held = packer.limits.max_kv_tokens
    if held is not None and held < sum(request.prompt_tokens for request in requests):
        return [(index, *span) for index, spans in cuts for span in spans]
    line = [(index, *spans[0]) for index, spans in cuts]
    return line + [(index, *span) for index, spans in cuts for span in spans[1:]]


def _packed(line: _Line) -> list[Round]:
    """The rounds of the least total time."""
    came_from = _cheapest_stretches(line)
    stretches: list[Round] = []
    last = len(line)
    while last:
        first = came_from[last]
        members = dict[int, Chunk]()
        for index, start, end in line.chunks[first:last]:
            if index in members:
                start = members[index].start
            members[index] = Chunk(index, start, end - start)
        stretches.append(tuple(members.values()))
        last = first
    return stretches[::-1]


class _Line:
    """The chunks of a line as columns, [num_chunks] each."""

    def __init__(
        self,
        packer: Packer,
        requests: Sequence[Request],
        line: Sequence[tuple[int, int, int]],
        caps_s: Sequence[float],
    ) -> None:
        self.chunks, limits = line, packer.limits
        self.longest_s, self.refused_s = 0.0, math.inf
        """The longest round of several chunks that a cap let in, and the shortest that one kept out, as far as they
        were looked at."""
        self._stages = [table.stage for table in packer.tables]
        self._most_tokens = packer.max_round_tokens
        self._most_held = np.inf if limits.max_kv_tokens is None else limits.max_kv_tokens
        request, self._start, self._end = np.array(line, dtype=np.int64).T
        self._prompt = np.array([each.prompt_tokens for each in requests], dtype=np.int64)[request]
        self._final = self._end == self._prompt
        self._cap_s = np.array(caps_s)[request] * (1.0 + ROUNDING)
        self._done = np.concatenate([[0], np.cumsum(self._end - self._start)])
        self._key = request * len(line)  # plus a place in the line: sorted by request, then by place
        self._sorted = np.sort(self._key + np.arange(len(line)))
        self._alone_s = self._added_s(self._end - self._start, self._start, self._final)

    def __len__(self) -> int:
        return len(self._start)

    def stretches_s(self, first: int, end: int) -> Floats:
        """Seconds of the rounds that begin with the chunks from `first` up to `end`, by how many chunks more they hold,
        [chunks, most that any holds]; infinite above the cap, but for a chunk alone."""
        begin = np.arange(first, end)
        added_s, held = np.zeros((len(self._stages), len(begin))), np.zeros(len(begin), dtype=np.int64)
        found: list[Floats] = []
        open_now = begin - first
        while open_now.size:
            begins = begin[open_now]
            last = begins + len(found)
            more_s, more_held = self._alone_s[:, last], self._prompt[last]
            earliest = self._sorted[np.searchsorted(self._sorted, self._key[last] + begins)] - self._key[last]
            joins = np.flatnonzero(earliest < last)  # the round holds chunks of the same request
            if joins.size:
                more_held[joins] = 0
                chunk, start = last[joins], self._start[earliest[joins]]
                before, both = self._start[chunk] - start, self._end[chunk] - start
                none = np.zeros(len(chunk), dtype=np.bool_)
                more_s[:, joins] = self._added_s(both, start, self._final[chunk]) - self._added_s(before, start, none)
            added_s[:, open_now] += more_s
            held[open_now] += more_held
            tokens = self._done[last + 1] - self._done[begins]
            seconds = added_s[:, open_now]
            for own_s, stage in zip(seconds, self._stages, strict=True):
                own_s += stage.round_overhead_s + stage.tokens_s(tokens)
            longest_s = seconds.max(axis=0)
            found.append(np.full(len(begin), np.inf))
            if len(found) > 1:
                within = (tokens <= self._most_tokens) & (held[open_now] <= self._most_held)
                under = longest_s <= self._cap_s[begins]
                self.refused_s = min(self.refused_s, float(longest_s[within & ~under].min(initial=np.inf)))
                within &= under
                open_now, longest_s, last = open_now[within], longest_s[within], last[within]
                self.longest_s = max(self.longest_s, float(longest_s.max(initial=0.0)))
            found[-1][open_now] = longest_s
            open_now = open_now[last + 1 < len(self)]
        return np.array(found).T

    def _added_s(self, tokens: Ints, context: Ints, final: npt.NDArray[np.bool_]) -> Floats:
        """What chunks add to a round on each table's stage, [stages, chunks]."""
        return np.array([stage.chunk_seconds(tokens, context, final) for stage in self._stages])


def _cheapest_stretches(line: _Line) -> list[int]:
    """Where the last stretch of the first j chunks begins, for every j, in the cheapest division of these j."""
    least, came_from = np.full(len(line) + 1, np.inf), np.zeros(len(line) + 1, dtype=np.int64)
    least[0] = 0.0
    for block in range(0, len(line), BLOCK):
        for first, seconds in enumerate(line.stretches_s(block, min(block + BLOCK, len(line))), start=block):
            ends = slice(first + 1, first + 1 + len(seconds))
            reached = least[first] + seconds[: len(line) - first]
            better = reached < least[ends]
            least[ends][better], came_from[ends][better] = reached[better], first
    found: list[int] = came_from.tolist()
    return found

"""Filling rounds up to a cap on their time: cost tables on the grid and the greedy packings that planners sweep.

Costs are looked up in Python lists: the loops take one short decision after another, for which lists and `bisect` are
several times faster than small numpy arrays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import TypeVar

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.problem import NO_LIMITS, Limits, Problem

EPSILON_S = 1e-12
"""What a round may exceed its cap by: rounding of sums."""
TABLE_TOKENS = 2**18
"""Rounds up to so many tokens are looked up: short prompts share rounds far longer than themselves."""
THRIFTY = 1.005
"""Costs of a token that differ by less are alike."""
Key = TypeVar("Key")
MOST_KEPT = 1 << 16
"""Chunks and round sizes whose seconds are kept: sweeps meet most of them again."""


class StageSeconds(dict[Key, list[float]]):
    """Seconds on each table's stage, found when first asked for."""

    def __init__(self, find: Callable[[Key], list[float]]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: Key) -> list[float]:
        if len(self) >= MOST_KEPT:
            self.clear()
        found = self[key] = self._find(key)
        return found


@dataclass(slots=True)
class StageTable:
    """One stage's costs on the grid, as lists: a chunk's base and slope by its units, a round's seconds by its
    units."""

    stage: StageCost
    multiple: int
    base: list[float]
    slope: list[float]
    tokens: list[float]
    """Round overhead and token-wise seconds."""
    thrifty: list[int]
    """For each number of units the largest up to it that no smaller one undercuts in the cost of context a token."""

    @classmethod
    def of(cls, stage: StageCost, multiple: int, chunk_units: int, round_units: int) -> StageTable:
        """Tables for chunks up to `chunk_units` and rounds up to `round_units` grid units."""
        chunk = np.arange(chunk_units + 2, dtype=np.float64) * multiple
        total = np.arange(round_units + 2, dtype=np.float64) * multiple
        slope = stage.attention.slope(chunk)
        return cls(
            stage,
            multiple,
            (stage.attention.base(chunk) + stage.chunk_s).tolist(),
            slope.tolist(),
            (stage.round_overhead_s + stage.tokens_s(total)).tolist(),
            _thrifty(slope),
        )

    def round_s(self, tokens: int) -> float:
        """Overhead and token-wise seconds of a round of `tokens`, linear between grid points."""
        unit, rest = divmod(tokens, self.multiple)
        if unit + 1 >= len(self.tokens):
            return self.stage.round_overhead_s + float(self.stage.tokens_s(tokens))
        low = self.tokens[unit]
        return low + (self.tokens[unit + 1] - low) * rest / self.multiple if rest else low

    def chunk_s(self, tokens: int, context: int) -> float:
        """Seconds a chunk adds to its round beside token-wise work; exact on the grid, linear between its points."""
        unit, rest = divmod(tokens, self.multiple)
        if unit + 1 >= len(self.base):
            return float(self.stage.chunk_seconds(tokens, context))
        base, slope = self.base[unit], self.slope[unit]
        if rest:
            share = rest / self.multiple
            base += (self.base[unit + 1] - base) * share
            slope += (self.slope[unit + 1] - slope) * share
        return base + slope * context

    def thriftier(self, units: int, seconds: Callable[[int], float]) -> int:
        """The thrifty number of units up to `units` if a token costs less with it; kernels fill a card in steps."""
        fewer = self.thrifty[units]
        return fewer if fewer and seconds(fewer) * units < seconds(units) * fewer else units


@dataclass(slots=True)
class OpenRound:
    """A round being filled up to a cap."""

    added_s: list[float]
    """Seconds the chunks add on each table's stage beside token-wise work."""
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0


class Packer:
    """Decides how long a chunk may be under a cap on the slowest stage's round time.

    Only stages that no other stage dominates term by term are looked at: 64 equal stages cost as much as one.
    """

    __slots__ = (
        "_hint",
        "_longest",
        "chunk_s",
        "cost",
        "finals_s",
        "limits",
        "max_round_tokens",
        "multiple",
        "round_s",
        "slowest",
        "tables",
    )

    def __init__(
        self,
        cost: CostModel,
        multiple: int,
        *,
        longest_tokens: int,
        total_tokens: int,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.cost = cost
        self.multiple = multiple
        self.limits = limits
        self._hint = 1
        self._longest: dict[tuple[float, ...], int] = {}
        self.max_round_tokens = total_tokens
        if limits.max_round_tokens is not None:
            self.max_round_tokens = min(total_tokens, limits.max_round_tokens)
        chunk_units = min(longest_tokens, self.max_round_tokens) // multiple + 1
        round_units = min(self.max_round_tokens, max(2 * longest_tokens, TABLE_TOKENS)) // multiple + 1
        self.tables = _undominated([StageTable.of(kind, multiple, chunk_units, round_units) for kind in cost.kinds])
        self.slowest = max(self.tables, key=lambda table: table.tokens[-1] + table.base[-1])
        tables = self.tables
        self.finals_s = [table.stage.final_s for table in tables]
        self.round_s = StageSeconds[int](lambda tokens: [table.round_s(tokens) for table in tables])
        """Overhead and token-wise seconds by a round's tokens."""
        self.chunk_s = StageSeconds[tuple[int, int]](lambda chunk: [table.chunk_s(*chunk) for table in tables])
        """What a chunk adds beside, by its tokens and its context; what ends a prompt left out."""

    @classmethod
    def of(cls, problem: Problem) -> Packer:
        """A packer for this problem."""
        return cls(
            problem.cost,
            problem.chunk_multiple,
            longest_tokens=max(request.new_tokens for request in problem.requests),
            total_tokens=sum(request.new_tokens for request in problem.requests),
            limits=problem.limits,
        )

    def open_round(self) -> OpenRound:
        """An empty round."""
        return OpenRound([0.0] * len(self.tables))

    def fits(self, into: OpenRound, tokens: int, context: int, final: bool, cap_s: float) -> bool:
        """Whether a chunk keeps the round within the cap."""
        most_s, added_s, chunk_s = cap_s + EPSILON_S, into.added_s, self.chunk_s[tokens, context]
        for i, round_s in enumerate(self.round_s[into.num_tokens + tokens]):
            seconds = round_s + added_s[i] + chunk_s[i]
            if (seconds + self.finals_s[i] if final else seconds) > most_s:
                return False
        return True

    def longest(self, into: OpenRound, start: int, left: int, cap_s: float) -> int:
        """Tokens of a prompt, from token `start` with `left` to go, that keep the round within cap and limits.

        The most that do, or fewer that cost less each.
        """
        room = self.max_round_tokens - into.num_tokens
        if left <= room and left <= 2 * self.multiple * self._hint and self.fits(into, left, start, True, cap_s):
            return left
        first, rest = divmod(into.num_tokens, self.multiple)
        share = rest / self.multiple
        units = min(left - 1, room) // self.multiple
        for table, added in zip(self.tables, into.added_s, strict=True):
            base, slope, tokens = table.base, table.slope, table.tokens

            def seconds(u: int) -> float:
                whole = base[u] + slope[u] * start + tokens[first + u]  # noqa: B023 - called before the loop goes on
                return whole + share * (tokens[first + u + 1] - tokens[first + u]) if share else whole  # noqa: B023 - called before the loop goes on

            units = self._most_units(min(units, len(tokens) - 2 - first), cap_s + EPSILON_S - added, seconds)
        if left <= room and units >= (left - 1) // self.multiple and self.fits(into, left, start, True, cap_s):
            return left
        if units < 1:
            return 0
        table = self.slowest
        before_s = table.tokens[first] if into.chunks else 0.0
        return self.multiple * table.thriftier(
            units, lambda u: table.base[u] + table.slope[u] * start + table.tokens[first + u] - before_s
        )

    def longest_again(self, into: OpenRound, start: int, left: int, cap_s: float) -> int:
        """The same, kept: in a batch of prompts alike the same rounds come again and again."""
        asked = (start, left, cap_s, into.num_tokens, *into.added_s)
        found = self._longest.get(asked)
        if found is None:
            if len(self._longest) >= MOST_KEPT:
                self._longest.clear()
            found = self._longest[asked] = self.longest(into, start, left, cap_s)
        return found

    def _most_units(self, highest: int, spare_s: float, seconds: Callable[[int], float]) -> int:
        """Most units up to `highest` whose seconds are at most `spare_s`; looks near the last answer first."""
        low, high, probe = 0, max(highest, 0), self._hint
        step = 2 + (probe >> 4)
        probe = min(probe, high)
        while low < probe:
            if seconds(probe) <= spare_s:
                low, probe = probe, min(probe + step, high)
            else:
                high, probe = probe - 1, probe - step
            step *= 4
        units = bisect_right(range(high + 1), spare_s, lo=low + 1, key=seconds) - 1 if low < high else low
        self._hint = max(units, 1)
        return units

    def add(self, into: OpenRound, request: int, start: int, tokens: int, final: bool) -> None:
        """Put a chunk into the round."""
        into.chunks.append(Chunk(request, start, tokens))
        into.num_tokens += tokens
        added_s = into.added_s
        for i, seconds in enumerate(self.chunk_s[tokens, start]):
            added_s[i] += seconds + self.finals_s[i] if final else seconds

    def seconds(self, chunks: Round, requests: Sequence[Request], filled: OpenRound | None = None) -> float:
        """Seconds of a round on the stage where it takes longest; `filled` holds what is in it beside the chunks."""
        filled = self.open_round() if filled is None else filled
        for chunk in chunks:
            self.add(
                filled, chunk.request, chunk.start, chunk.tokens, chunk.end == requests[chunk.request].prompt_tokens
            )
        return self.filled_s(filled)

    def filled_s(self, filled: OpenRound) -> float:
        """Seconds of what a round holds so far, on the stage where it takes longest."""
        longest: float = max(map(add, self.round_s[filled.num_tokens], filled.added_s))
        return longest

    def earliest_start(self, end: int, cached: int, final: bool, cap_s: float) -> int:
        """The start of a chunk up to token `end` that fits in a round of its own.

        The earliest, or a later one after which a token costs less.
        """
        multiple = self.multiple
        units, rest = divmod(end - cached, multiple)
        if rest:  # the prompt's last tokens: off the grid, looked up with interpolation
            most, share, last = min(units, (self.max_round_tokens - rest) // multiple), rest / multiple, end - rest
            for table in self.tables:
                base, slope, tokens = table.base, table.slope, table.tokens

                def seconds(u: int) -> float:
                    base_s = base[u] + (base[u + 1] - base[u]) * share  # noqa: B023 - called before the loop goes on
                    context_s = slope[u] + (slope[u + 1] - slope[u]) * share  # noqa: B023 - called before the loop goes on
                    round_s = tokens[u] + (tokens[u + 1] - tokens[u]) * share  # noqa: B023 - called before the loop goes on
                    return base_s + context_s * (last - u * multiple) + round_s

                spare = cap_s + EPSILON_S - (table.stage.final_s if final else 0.0)
                most = self._most_units(min(most, len(tokens) - 2), spare, seconds)
            chunk = most * multiple + rest
        else:
            most = min(units, self.max_round_tokens // multiple)
            for table in self.tables:
                base, slope, tokens = table.base, table.slope, table.tokens
                spare = cap_s + EPSILON_S - (table.stage.final_s if final else 0.0)
                most = self._most_units(
                    min(most, len(tokens) - 1),
                    spare,
                    lambda u: base[u] + slope[u] * (end - u * multiple) + tokens[u],  # noqa: B023 - called before the loop goes on
                )
            table = self.slowest
            most = table.thriftier(
                most, lambda u: table.base[u] + table.slope[u] * (end - u * multiple) + table.tokens[u]
            )
            chunk = max(most, 1) * multiple
        return end - chunk


def pack_in_order(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[Round]:
    """Fill each round up to the cap, request after request: the next one gets the room that the one before leaves.

    `caps_s` has one cap a request; a round keeps the cap of the request that opens it.
    """
    spans = [(index, requests[index].cached_tokens, requests[index].prompt_tokens) for index in order]
    return fill_rounds(packer, requests, spans, caps_s)


def pack_tails(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[Round]:
    """Cut each request backwards into the longest chunks the cap allows; fill rounds with what is left at the fronts.

    Long prompts' late chunks, whose context is expensive to read twice, are then as few as the cap allows and each
    fill a round. Whole short prompts and the long prompts' first chunks read (almost) no context: cutting them
    anywhere is free, so they fill rounds to the brim, in order, before the late chunks.
    """
    fronts: list[tuple[int, int, int]] = []
    tails: list[Round] = []
    for index, late in zip(order, backward_cuts(packer, requests, order, caps_s), strict=True):
        fronts.append((index, requests[index].cached_tokens, late[0].end))
        tails.extend((chunk,) for chunk in late[1:])
    return fill_rounds(packer, requests, fronts, caps_s) + tails


def backward_cuts(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[list[Chunk]]:
    """Requests cut backwards into the longest chunks that their caps allow, each in running order."""
    known: dict[tuple[int, int, float], list[tuple[int, int]]] = {}  # requests alike are cut alike
    cuts = []
    for index in order:
        request = requests[index]
        alike = (request.prompt_tokens, request.cached_tokens, caps_s[index])
        if alike not in known:
            known[alike] = _backward_spans(packer, *alike)
        cuts.append([Chunk(index, start, tokens) for start, tokens in known[alike]])
    return cuts


def _backward_spans(packer: Packer, prompt: int, cached: int, cap_s: float) -> list[tuple[int, int]]:
    """(start, tokens) of the chunks of one prompt."""
    spans, end = list[tuple[int, int]](), prompt
    while end > cached:
        start = packer.earliest_start(end, cached, end == prompt, cap_s)
        spans.append((start, end - start))
        end = start
    return spans[::-1]


def fill_rounds(
    packer: Packer,
    requests: Sequence[Request],
    spans: Sequence[tuple[int, int, int]],
    caps_s: Sequence[float] | Mapping[int, float],
) -> list[Round]:
    """Pack (request, first token, end) spans in order, each into as few and as early rounds as the cap allows.

    A chunk that no cap would let in runs in a round of its own, one grid unit long.
    """
    rounds: list[Round] = []
    most_held = packer.limits.max_kv_tokens
    current, held, cap_s = packer.open_round(), 0, 0.0
    for index, start, end in spans:
        request = requests[index]
        if most_held is not None and held + request.prompt_tokens > most_held:
            rounds.append(tuple(current.chunks))  # its room is free once all before it are done
            current, held = packer.open_round(), 0
        held += request.prompt_tokens
        while start < end:
            if not current.chunks:
                cap_s = caps_s[index]
            tokens = min(packer.longest_again(current, start, request.prompt_tokens - start, cap_s), end - start)
            if not tokens:
                if current.chunks:
                    rounds.append(tuple(current.chunks))
                    current, held = packer.open_round(), request.prompt_tokens
                    continue
                tokens = min(packer.multiple, end - start)
            final = start + tokens == request.prompt_tokens
            packer.add(current, index, start, tokens, final)
            start += tokens
            if start < end:
                rounds.append(tuple(current.chunks))
                current, held = packer.open_round(), request.prompt_tokens
    if current.chunks:
        rounds.append(tuple(current.chunks))
    return rounds


def _thrifty(slope: Floats) -> list[int]:
    units = np.arange(len(slope))
    rate = slope / np.maximum(units, 1)
    least = np.minimum.accumulate(np.concatenate([[np.inf], rate[1:]]))
    thrifty: list[int] = np.maximum.accumulate(np.where(rate <= THRIFTY * least, units, 0)).tolist()
    return thrifty


def _undominated(tables: list[StageTable]) -> list[StageTable]:
    """The tables that are above every other one somewhere."""
    columns = [np.concatenate([t.base, t.slope, t.tokens, [t.stage.final_s]]) for t in tables]
    kept: list[int] = []
    for i, mine in enumerate(columns):
        if not any(np.all(mine <= other) for j, other in enumerate(columns) if j in kept or j > i):
            kept.append(i)
    return [tables[i] for i in kept]

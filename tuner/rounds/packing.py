"""Filling rounds up to a cap on their time: cost tables on the grid and the greedy packings that planners sweep.

Costs are looked up in Python lists: the loops take one short decision after another, for which lists and `bisect` are
several times faster than small numpy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
MOST_KEPT = 1 << 16
"""Decisions that are kept for a batch of prompts alike."""


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

    def most_units(self, start: int, first: int, share: float, highest: int, spare_s: float, near: int) -> int:
        """Most units up to `highest` that a chunk after `start` tokens may have in a round that holds `first` units and
        a `share` of one, its seconds at most `spare_s`; looks near a guess first."""
        base, slope, tokens = self.base, self.slope, self.tokens
        low, high, step, probe = 0, highest, 1, near if near < highest else highest
        while low < high:
            at = first + probe
            seconds = base[probe] + slope[probe] * start + tokens[at]
            if share:
                seconds += share * (tokens[at + 1] - tokens[at])
            if seconds <= spare_s:
                low = probe
                probe = probe + step if step and probe + step < high else high
            else:
                high = probe - 1
                probe -= step
            step *= 4
            if not step or probe <= low:  # the guess is used up: halve what is left
                step, probe = 0, (low + high + 1) >> 1
        return low

    def most_units_before(self, end: int, rest: int, highest: int, spare_s: float, near: int) -> int:
        """The same of a chunk that ends at token `end`, alone in its round, with `rest` tokens beside its units."""
        base, slope, tokens, multiple = self.base, self.slope, self.tokens, self.multiple
        low, high, step, probe = 0, highest, 1, near if near < highest else highest
        end, share = end - rest, rest / multiple
        while low < high:
            context = end - probe * multiple
            seconds = base[probe] + slope[probe] * context + tokens[probe]
            if share:
                after = probe + 1
                more = base[after] - base[probe] + (slope[after] - slope[probe]) * context
                seconds += share * (more + tokens[after] - tokens[probe])
            if seconds <= spare_s:
                low = probe
                probe = probe + step if step and probe + step < high else high
            else:
                high = probe - 1
                probe -= step
            step *= 4
            if not step or probe <= low:
                step, probe = 0, (low + high + 1) >> 1
        return low

    def thriftier(self, units: int, start: int, first: int, before_s: float) -> int:
        """The thrifty number of units up to `units` if a token costs less with it beside `first` units in the round,
        whose own seconds are `before_s`; kernels fill a card in steps."""
        fewer = self.thrifty[units]
        if not fewer or fewer == units:
            return units
        base, slope, tokens = self.base, self.slope, self.tokens
        fewer_s = base[fewer] + slope[fewer] * start + tokens[first + fewer] - before_s
        units_s = base[units] + slope[units] * start + tokens[first + units] - before_s
        return fewer if fewer_s * units < units_s * fewer else units

    def thriftier_before(self, units: int, end: int) -> int:
        """The same of a chunk that ends at token `end`, alone in its round."""
        fewer = self.thrifty[units]
        if not fewer or fewer == units:
            return units
        base, slope, tokens, multiple = self.base, self.slope, self.tokens, self.multiple
        fewer_s = base[fewer] + slope[fewer] * (end - fewer * multiple) + tokens[fewer]
        units_s = base[units] + slope[units] * (end - units * multiple) + tokens[units]
        return fewer if fewer_s * units < units_s * fewer else units


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
        "_longest",
        "_near",
        "cost",
        "limits",
        "max_round_tokens",
        "multiple",
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
        self._near = 1
        self._longest: dict[tuple[float, ...], int] = {}
        self.max_round_tokens = total_tokens
        if limits.max_round_tokens is not None:
            self.max_round_tokens = min(total_tokens, limits.max_round_tokens)
        chunk_units = min(longest_tokens, self.max_round_tokens) // multiple + 1
        round_units = min(self.max_round_tokens, max(2 * longest_tokens, TABLE_TOKENS)) // multiple + 1
        tables = _undominated([StageTable.of(kind, multiple, chunk_units, round_units) for kind in cost.kinds])
        self.tables = sorted(tables, key=lambda table: -table.tokens[-1] - table.base[-1])
        """The slowest first: it allows the least, most often."""

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
        most_s, total = cap_s + EPSILON_S, into.num_tokens + tokens
        for table, added_s in zip(self.tables, into.added_s, strict=True):
            seconds = table.round_s(total) + added_s + table.chunk_s(tokens, context)
            if (seconds + table.stage.final_s if final else seconds) > most_s:
                return False
        return True

    def longest(self, into: OpenRound, start: int, left: int, cap_s: float) -> int:
        """Tokens of a prompt, from token `start` with `left` to go, that keep the round within cap and limits.

        The most that do, or fewer that cost less each.
        """
        multiple, held = self.multiple, into.num_tokens
        room = self.max_round_tokens - held
        if left <= room and left <= 2 * multiple * self._near and self.fits(into, left, start, True, cap_s):
            return left
        first, rest = divmod(held, multiple)
        share = rest / multiple
        units = (left - 1 if left <= room else room) // multiple
        near, most_s = self._near, cap_s + EPSILON_S
        for table, added_s in zip(self.tables, into.added_s, strict=True):
            highest = len(table.tokens) - 2 - first
            highest = units if units < highest else highest
            near = units = table.most_units(start, first, share, highest, most_s - added_s, near) if highest > 0 else 0
        self._near = units or 1
        if left <= room and units >= (left - 1) // multiple and self.fits(into, left, start, True, cap_s):
            return left
        if units < 1:
            return 0
        table = self.tables[0]
        return multiple * table.thriftier(units, start, first, table.tokens[first] if into.chunks else 0.0)

    def longest_again(self, into: OpenRound, start: int, left: int, cap_s: float) -> int:
        """The same, kept: in a batch of prompts alike the same rounds come again and again."""
        asked = (start, left, cap_s, into.num_tokens, *into.added_s)
        found = self._longest.get(asked)
        if found is None:
            if len(self._longest) >= MOST_KEPT:
                self._longest.clear()
            found = self._longest[asked] = self.longest(into, start, left, cap_s)
        return found

    def add(self, into: OpenRound, request: int, start: int, tokens: int, final: bool) -> None:
        """Put a chunk into the round."""
        into.chunks.append(Chunk(request, start, tokens))
        into.num_tokens += tokens
        added_s = into.added_s
        for i, table in enumerate(self.tables):
            seconds = table.chunk_s(tokens, start)
            added_s[i] += seconds + table.stage.final_s if final else seconds

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
        return max(
            table.round_s(filled.num_tokens) + added_s
            for table, added_s in zip(self.tables, filled.added_s, strict=True)
        )

    def earliest_start(self, end: int, cached: int, final: bool, cap_s: float) -> int:
        """The start of a chunk up to token `end` that fits in a round of its own.

        The earliest, or a later one after which a token costs less.
        """
        multiple = self.multiple
        units, rest = divmod(end - cached, multiple)
        most = min(units, (self.max_round_tokens - rest) // multiple)
        near = self._near
        for table in self.tables:
            spare_s = cap_s + EPSILON_S - (table.stage.final_s if final else 0.0)
            near = most = table.most_units_before(end, rest, min(most, len(table.tokens) - 2), spare_s, near)
        self._near = most or 1
        if rest:  # the prompt's last tokens: off the grid
            return end - most * multiple - rest
        return end - max(self.tables[0].thriftier_before(most, end), 1) * multiple


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
    for index, spans in zip(order, backward_spans(packer, requests, order, caps_s), strict=True):
        fronts.append((index, *spans[0]))
        tails.extend((Chunk(index, start, end - start),) for start, end in spans[1:])
    return fill_rounds(packer, requests, fronts, caps_s) + tails


def backward_spans(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[list[tuple[int, int]]]:
    """Requests cut backwards into the longest chunks that their caps allow: (start, end) of each chunk, in running
    order."""
    known: dict[tuple[int, int, float], list[tuple[int, int]]] = {}  # requests alike are cut alike
    cuts = []
    for index in order:
        request = requests[index]
        alike = (request.prompt_tokens, request.cached_tokens, caps_s[index])
        spans = known.get(alike)
        if spans is None:
            spans = known[alike] = _backward_spans(packer, *alike)
        cuts.append(spans)
    return cuts


def _backward_spans(packer: Packer, prompt: int, cached: int, cap_s: float) -> list[tuple[int, int]]:
    """(start, end) of the chunks of one prompt."""
    spans, end = list[tuple[int, int]](), prompt
    while end > cached:
        start = packer.earliest_start(end, cached, end == prompt, cap_s)
        spans.append((start, end))
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

"""Filling rounds up to a cap on their time: the greedy packings that planners sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round
from tuner.rounds.packing.stage_table import StageTable, undominated
from tuner.rounds.problem import NO_LIMITS, Limits, Problem

EPSILON_S = 1e-12
"""What a round may exceed its cap by: rounding of sums."""
TABLE_TOKENS = 2**18
"""Rounds up to so many tokens are looked up: short prompts share rounds far longer than themselves."""
MOST_KEPT = 1 << 16
"""Decisions that are kept for a batch of prompts alike."""


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
        tables = undominated([StageTable.of(kind, multiple, chunk_units, round_units) for kind in cost.kinds])
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

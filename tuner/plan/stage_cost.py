"""How long a round takes on one stage: token-wise work, attention and fixed costs, as tables or as two numbers.

    t(round) = round_overhead_s + tokens(sum of the chunks' tokens)
             + sum over chunks of base(c) + slope(c) * p  +  chunk_s  +  final_s if the chunk ends its prompt

for chunks of c tokens after p context tokens. Every term is non-negative and none falls with more tokens; the planner
and its lower bound rely on both, so both are checked when a cost is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from db.errors import UserError

MAX_SECONDS = 1e9
MAX_TOKENS = 2**40
MAX_POINTS = 100_000
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAttention:
    """Attention seconds of a chunk of c tokens after p context tokens.

    pair_s * (c*p + c*(c+1)/2) + context_token_s * p: each token attends to all before it and to itself, and the chunk
    reads its context once.
    """

    pair_s: float = 0.0
    context_token_s: float = 0.0

    def __post_init__(self) -> None:
        check_seconds("attention.pair_s", self.pair_s)
        check_seconds("attention.context_token_s", self.context_token_s)

    def base(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds of chunks of these many tokens at context 0."""
        count = np.asarray(tokens, dtype=np.float64)
        return self.pair_s * count * (count + 1.0) / 2.0

    def slope(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds that each context token adds to chunks of these many tokens."""
        return self.pair_s * np.asarray(tokens, dtype=np.float64) + self.context_token_s

    def to_json(self) -> dict[str, Any]:
        """The two numbers of isochunk.cost-model/1."""
        return {"pair_s": self.pair_s, "context_token_s": self.context_token_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableAttention:
    """Measured attention: base(c) + slope(c) * p, both linear between the points of `count`.

    Beyond the last point base grows with the square of c and slope in proportion to c, as causal attention does;
    below the first point both keep its value (a kernel has a shortest time).
    """

    count: tuple[int, ...]
    base_s: tuple[float, ...]
    context_s: tuple[float, ...]
    _table: tuple[Floats, Floats, Floats] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = _checked("attention", self.count, {"base_s": self.base_s, "context_s": self.context_s}, first=1)
        object.__setattr__(self, "_table", table)

    def base(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds of chunks of these many tokens at context 0."""
        chunk, (count, base, _) = np.asarray(tokens, dtype=np.float64), self._table
        seconds: Floats = np.interp(chunk, count, base) * np.maximum(chunk / count[-1], 1.0) ** 2
        return seconds

    def slope(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds that each context token adds to chunks of these many tokens."""
        chunk, (count, _, slope) = np.asarray(tokens, dtype=np.float64), self._table
        seconds: Floats = np.interp(chunk, count, slope) * np.maximum(chunk / count[-1], 1.0)
        return seconds

    def to_json(self) -> dict[str, Any]:
        """The table, a list a column."""
        return {"count": list(self.count), "base_s": list(self.base_s), "context_s": list(self.context_s)}


Attention = PairAttention | TableAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The cost of a round on one stage."""

    token_count: tuple[int, ...]
    """Points of the tokens table: tokens of a whole round."""
    token_seconds: tuple[float, ...]
    """Seconds at those points, linear between them; the last slope holds beyond them."""
    attention: Attention = field(default_factory=PairAttention)
    round_overhead_s: float = 0.0
    """Seconds each round costs whatever it holds."""
    chunk_s: float = 0.0
    """Seconds each chunk in a round costs whatever its length (one request more in the round)."""
    final_s: float = 0.0
    """Seconds each chunk that ends its prompt costs on top (final norm and head, on the last stage)."""
    _table: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("round_overhead_s", "chunk_s", "final_s"):
            check_seconds(name, getattr(self, name))
        table = _checked("tokens", self.token_count, {"seconds": self.token_seconds}, first=0)
        object.__setattr__(self, "_table", table)

    def tokens_s(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds of the token-wise work (GEMMs, norms, collectives) of rounds of these many tokens."""
        count, seconds = self._table
        total = np.asarray(tokens, dtype=np.float64)
        last_slope = (seconds[-1] - seconds[-2]) / (count[-1] - count[-2]) if len(count) > 1 else 0.0
        inside: Floats = np.interp(total, count, seconds)
        seconds_beyond: Floats = last_slope * np.maximum(total - count[-1], 0.0)
        return inside + seconds_beyond

    def chunk_seconds(self, tokens: npt.ArrayLike, context: npt.ArrayLike, final: npt.ArrayLike = False) -> Floats:
        """Seconds that chunks add to their round beside its token-wise work: attention, `chunk_s` and `final_s`."""
        attention = self.attention.base(tokens) + self.attention.slope(tokens) * np.asarray(context, dtype=np.float64)
        return attention + self.chunk_s + self.final_s * np.asarray(final, dtype=np.float64)

    def seconds(self, chunks: Iterable[tuple[int, int, bool]]) -> float:
        """Seconds of one round; `chunks` are (tokens, context, ends its prompt)."""
        tokens, context, final = (np.array(column) for column in zip(*chunks, strict=True))
        added = self.chunk_seconds(tokens, context, final).sum()
        return float(self.round_overhead_s + self.tokens_s(tokens.sum()) + added)

    def to_json(self) -> dict[str, Any]:
        """One entry of `stages`; `chunk_s` and `final_s` only where they are not zero."""
        out: dict[str, Any] = {
            "round_overhead_s": self.round_overhead_s,
            "tokens": {"count": list(self.token_count), "seconds": list(self.token_seconds)},
            "attention": self.attention.to_json(),
        }
        return out | {name: value for name in ("chunk_s", "final_s") if (value := getattr(self, name))}


def sum_of(costs: Sequence[StageCost]) -> StageCost:
    """What a round takes in several groups together.

    Exact where their attention is of one form (tables over the same points); otherwise attention is left out, so that
    the sum is never above the truth.
    """
    if len(costs) == 1:
        return costs[0]
    count = sorted({point for cost in costs for point in cost.token_count})
    attentions = [cost.attention for cost in costs]
    pairs = [each for each in attentions if isinstance(each, PairAttention)]
    tables = [each for each in attentions if isinstance(each, TableAttention)]
    attention: Attention = PairAttention()
    if len(pairs) == len(costs):
        attention = PairAttention(
            pair_s=sum(each.pair_s for each in pairs), context_token_s=sum(each.context_token_s for each in pairs)
        )
    elif len(tables) == len(costs) and len({each.count for each in tables}) == 1:
        attention = TableAttention(
            count=tables[0].count,
            base_s=tuple(map(sum, zip(*(each.base_s for each in tables), strict=True))),
            context_s=tuple(map(sum, zip(*(each.context_s for each in tables), strict=True))),
        )
    # Beyond its last point a table goes on with its last slope: one point more keeps that of all.
    count = [*count, count[-1] + 1]
    seconds = np.sum([cost.tokens_s(count) for cost in costs], axis=0)
    return StageCost(
        token_count=tuple(count),
        token_seconds=tuple(np.maximum.accumulate(seconds).tolist()),
        attention=attention,
        round_overhead_s=sum(cost.round_overhead_s for cost in costs),
        chunk_s=sum(cost.chunk_s for cost in costs),
        final_s=sum(cost.final_s for cost in costs),
    )


def scaled_stage(stage: StageCost, factor: float) -> StageCost:
    """A stage's costs multiplied by `factor`."""

    def times(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value * factor for value in values)

    old = stage.attention
    new: Attention
    if isinstance(old, PairAttention):
        new = PairAttention(pair_s=old.pair_s * factor, context_token_s=old.context_token_s * factor)
    else:
        new = TableAttention(count=old.count, base_s=times(old.base_s), context_s=times(old.context_s))
    return StageCost(
        token_count=stage.token_count,
        token_seconds=times(stage.token_seconds),
        attention=new,
        round_overhead_s=stage.round_overhead_s * factor,
        chunk_s=stage.chunk_s * factor,
        final_s=stage.final_s * factor,
    )


def check_seconds(name: str, value: float) -> None:
    """Raise `UserError` unless `value` is a finite number of seconds, neither negative nor above the limit."""
    if not 0.0 <= value <= MAX_SECONDS:
        raise UserError(name, value, f"a finite number of seconds, at least 0 and at most {MAX_SECONDS:g}, is needed")


def _checked(
    name: str, count: Sequence[int], columns: Mapping[str, Sequence[float]], *, first: int
) -> tuple[Floats, ...]:
    """The points and the columns as arrays: points rise strictly from `first` on, no column is negative or falls."""
    if not count:
        raise UserError(f"{name}.count", "[]", "at least one point is needed")
    if len(count) > MAX_POINTS:
        raise UserError(f"{name}.count", f"{len(count)} points", f"at most {MAX_POINTS}")
    points = np.asarray(count, dtype=np.float64)  # exact up to MAX_TOKENS and far beyond
    if points[0] < first or points[-1] > MAX_TOKENS or not (points[1:] > points[:-1]).all():
        _refuse_points(name, count, first)
    table = [points]
    for column, values in columns.items():
        if len(values) != len(count):
            raise UserError(f"{name}.{column}", f"{len(values)} values", f"one value a point ({len(count)}) is needed")
        seconds = np.asarray(values, dtype=np.float64)
        table.append(seconds)
        if seconds[0] >= 0.0 and seconds[-1] <= MAX_SECONDS and (seconds[1:] >= seconds[:-1]).all():
            continue  # so all are finite; the loop finds which one is not as it should be
        for i, value in enumerate(values):
            check_seconds(f"{name}.{column}[{i}]", value)
            if i and value < values[i - 1]:
                allowed = f"time may not fall with more tokens (the point before has {values[i - 1]})"
                raise UserError(f"{name}.{column}[{i}]", value, allowed)
    return tuple(table)


def _refuse_points(name: str, count: Sequence[int], first: int) -> None:
    """Raise `UserError` for the first point that is not as it should be."""
    for i, point in enumerate(count):
        if not point >= first or (i and not point > count[i - 1]):
            raise UserError(f"{name}.count[{i}]", point, f"whole numbers from {first} up, each above the one before")
        if point > MAX_TOKENS:
            raise UserError(f"{name}.count[{i}]", point, f"at most {MAX_TOKENS} tokens")

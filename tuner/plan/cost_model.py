"""How long a round takes on each stage: the cost model, its file, and its vectorised evaluation.

    t(round) = round_overhead_s + tokens(sum of the chunks' tokens)
             + sum over chunks of base(c) + slope(c) * p  +  chunk_s  +  final_s if the chunk ends its prompt

for chunks of c tokens after p context tokens. Where a stage holds several groups of layers ("virtual stages"), each
group has such a cost of its own; with one group a stage, stage and group are the same. Every term is non-negative and
none falls with more tokens; the planner and its lower bound rely on both, so both are checked when a model is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from db.errors import UserError
from db.files.documents import located, of_schema, parse, read_json, write_json
from tuner.plan.stage_order import StageOrder, stages_of_groups

SCHEMA = "isochunk.cost-model/1"
SCHEMA_2 = "isochunk.cost-model/2"  # written where a stage holds several groups of layers
MAX_SECONDS = 1e9
MAX_TOKENS = 2**40
MAX_STAGES = 1024
MAX_POINTS = 100_000
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAttention:
    """Attention seconds of a chunk of c tokens after p context tokens.

    pair_s * (c*p + c*(c+1)/2) + context_token_s * p: each token attends to all before it and to itself, and the chunk
    reads its context once.
    """

    pair_s: float = 0.0
    context_token_s: float = 0.0

    def __post_init__(self) -> None:
        _check_seconds("attention.pair_s", self.pair_s)
        _check_seconds("attention.context_token_s", self.context_token_s)

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
        _check_table("attention", self.count, {"base_s": self.base_s, "context_s": self.context_s}, first=1)
        table = tuple(np.asarray(x, dtype=np.float64) for x in (self.count, self.base_s, self.context_s))
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
            _check_seconds(name, getattr(self, name))
        _check_table("tokens", self.token_count, {"seconds": self.token_seconds}, first=0)
        table = tuple(np.asarray(x, dtype=np.float64) for x in (self.token_count, self.token_seconds))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The cost of rounds on a pipeline: one StageCost a group of layers (or one for all alike), in the order in which
    rounds go through them; the hand-off between stages and the return."""

    stages: tuple[StageCost, ...]
    hop_latency_s: float = 0.0
    hop_token_s: float = 0.0
    return_s: float = 0.0
    """Seconds from a round's end in the last group until stage 0 knows it (it opens the window)."""
    virtual_stages: int = 1
    """Groups a stage."""
    stage_order: StageOrder = StageOrder.LOOP
    kinds: tuple[StageCost, ...] = field(init=False, repr=False, compare=False)
    """The stages that differ, each once: arrays over kinds instead of stages keep 64 equal stages cheap."""
    kind_of_stage: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise UserError("stages", f"{len(self.stages)} entries", f"at least one stage, at most {MAX_STAGES}")
        if self.virtual_stages < 1:
            raise UserError("virtual_stages", self.virtual_stages, "at least 1")
        if len(self.stages) > 1 and len(self.stages) % self.virtual_stages:
            allowed = f"1 or a multiple of virtual_stages ({self.virtual_stages}) entries are allowed"
            raise UserError("stages", len(self.stages), allowed)
        _check_seconds("hop.latency_s", self.hop_latency_s)
        _check_seconds("hop.token_s", self.hop_token_s)
        _check_seconds("return_s", self.return_s)
        kinds = tuple(dict.fromkeys(self.stages))
        index = {stage: i for i, stage in enumerate(kinds)}
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "kind_of_stage", np.array([index[stage] for stage in self.stages], dtype=np.int64))

    @property
    def pp_size(self) -> int:
        """Number of stages."""
        return max(len(self.stages) // self.virtual_stages, 1)

    @property
    def stage_of_group(self) -> tuple[int, ...]:
        """The stage that holds each group."""
        return stages_of_groups(self.pp_size, self.virtual_stages, self.stage_order)

    def merged(self) -> CostModel:
        """Each stage's groups as one: what a round costs a stage in all, without the passes."""
        if self.virtual_stages == 1:
            return self
        held: list[list[StageCost]] = [[] for _ in range(self.pp_size)]
        for stage, cost in zip(self.stage_of_group, self.stages, strict=True):
            held[stage].append(cost)
        return replace(self, stages=tuple(sum_of(costs) for costs in held), virtual_stages=1)

    def for_pp_size(self, pp_size: int) -> CostModel:
        """This model on `pp_size` stages; one entry stands for all. Raises UserError if the numbers do not match."""
        num_groups = pp_size * self.virtual_stages
        if len(self.stages) == num_groups:
            return self
        if len(self.stages) != 1:
            needed = f"pp_size ({pp_size})" if self.virtual_stages == 1 else f"pp_size x virtual_stages ({num_groups})"
            allowed = f"the model has {len(self.stages)} stages; 1 or {needed} entries are allowed"
            raise UserError("stages", len(self.stages), allowed)
        if not 1 <= num_groups <= MAX_STAGES:
            raise UserError("pp_size", pp_size, f"at least 1, at most {MAX_STAGES // self.virtual_stages}")
        return replace(self, stages=self.stages * num_groups)

    def scaled(self, factor: float) -> CostModel:
        """The same engine with all costs multiplied by `factor` (another unit of time)."""
        return replace(
            self,
            stages=tuple(scaled_stage(stage, factor) for stage in self.stages),
            hop_latency_s=self.hop_latency_s * factor,
            hop_token_s=self.hop_token_s * factor,
            return_s=self.return_s * factor,
        )

    def without_attention(self) -> CostModel:
        """The same engine with attention that costs nothing."""
        stages = tuple(replace(stage, attention=PairAttention()) for stage in self.stages)
        return replace(self, stages=stages)

    def stage_seconds(self, stage_index: int, chunks: Iterable[tuple[int, int, bool]]) -> float:
        """Seconds of one round on one stage; `chunks` are (tokens, context, ends its prompt)."""
        return self.stages[stage_index].seconds(chunks)

    def round_seconds(self, round_index: Ints, tokens: Ints, context: Ints, final: npt.NDArray[np.bool_]) -> Floats:
        """Seconds of every round in every group, [num_rounds, num_groups]; the arguments hold one entry a chunk.

        `round_index` counts from 0 without gaps.
        """
        num_rounds = int(round_index.max()) + 1
        total = np.bincount(round_index, weights=tokens, minlength=num_rounds)
        columns = []
        for kind in self.kinds:
            added = np.bincount(round_index, weights=kind.chunk_seconds(tokens, context, final), minlength=num_rounds)
            columns.append(kind.round_overhead_s + kind.tokens_s(total) + added)
        return np.stack(columns, axis=1)[:, self.kind_of_stage]

    def hop_seconds(self, tokens: npt.ArrayLike) -> Floats:
        """Seconds from a round's end on a stage to its earliest start on the next, for rounds of these many tokens."""
        return self.hop_latency_s + self.hop_token_s * np.asarray(tokens, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """The content of an isochunk.cost-model/1 file, with several groups a stage /2; equal stages are written
        once."""
        stages = self.kinds if len(self.kinds) == 1 else self.stages
        passes = {"virtual_stages": self.virtual_stages, "stage_order": self.stage_order}
        return {
            "schema": SCHEMA if self.virtual_stages == 1 else SCHEMA_2,
            **(passes if self.virtual_stages > 1 else {}),
            "stages": [stage.to_json() for stage in stages],
            "hop": {"latency_s": self.hop_latency_s, "token_s": self.hop_token_s},
            "return_s": self.return_s,
        }

    @classmethod
    def from_json(cls, data: object) -> CostModel:
        """Read the content of an isochunk.cost-model/1 or /2 file; unknown fields are ignored. Raises UserError."""
        content = of_schema(data, SCHEMA, SCHEMA_2)
        file = parse(CostModelFile, content)
        passes = (file.virtual_stages, file.stage_order) if content["schema"] == SCHEMA_2 else (1, StageOrder.LOOP)
        return cls(
            virtual_stages=passes[0],
            stage_order=passes[1],
            stages=tuple(_stage_cost(f"stages[{i}]", stage) for i, stage in enumerate(file.stages)),
            hop_latency_s=file.hop.latency_s,
            hop_token_s=file.hop.token_s,
            return_s=file.return_s,
        )


def load_cost_model(path: str | Path) -> CostModel:
    """Read an isochunk.cost-model/1 file. Raises UserError naming the field, its value and what is allowed."""
    content = read_json(path, field="cost model")
    with located(path):
        return CostModel.from_json(content)


def save_cost_model(path: str | Path, model: CostModel) -> None:
    """Write an isochunk.cost-model/1 file, atomically."""
    write_json(path, model.to_json())


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokensTable:
    count: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _AttentionEntry:
    """Two numbers, or a table where `count` is given."""

    pair_s: float = 0.0
    context_token_s: float = 0.0
    count: tuple[float, ...] | None = None
    base_s: tuple[float, ...] = ()
    context_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _StageEntry:
    tokens: _TokensTable
    attention: _AttentionEntry = _AttentionEntry()
    round_overhead_s: float = 0.0
    chunk_s: float = 0.0
    final_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _HopEntry:
    latency_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModelFile:
    """isochunk.cost-model/1 and /2 as they are written; the last two fields are read in /2."""

    stages: tuple[_StageEntry, ...]
    hop: _HopEntry = _HopEntry()
    return_s: float = 0.0
    virtual_stages: int = 1
    stage_order: StageOrder = StageOrder.LOOP


def _stage_cost(where: str, entry: _StageEntry) -> StageCost:
    found = entry.attention
    try:
        return StageCost(
            token_count=_whole_numbers("tokens.count", entry.tokens.count),
            token_seconds=entry.tokens.seconds,
            attention=PairAttention(pair_s=found.pair_s, context_token_s=found.context_token_s)
            if found.count is None
            else TableAttention(
                count=_whole_numbers("attention.count", found.count), base_s=found.base_s, context_s=found.context_s
            ),
            round_overhead_s=entry.round_overhead_s,
            chunk_s=entry.chunk_s,
            final_s=entry.final_s,
        )
    except UserError as error:
        raise UserError(f"{where}.{error.field}", error.value, error.allowed) from None


def _whole_numbers(name: str, numbers: Sequence[float]) -> tuple[int, ...]:
    for i, number in enumerate(numbers):
        if not number.is_integer():
            raise UserError(f"{name}[{i}]", number, "a whole number is needed")
    return tuple(int(number) for number in numbers)


def _check_seconds(name: str, value: float) -> None:
    if not 0.0 <= value <= MAX_SECONDS:
        raise UserError(name, value, f"a finite number of seconds, at least 0 and at most {MAX_SECONDS:g}, is needed")


def _check_table(name: str, count: Sequence[int], columns: Mapping[str, Sequence[float]], *, first: int) -> None:
    """Points rise strictly from at least `first`; no column is negative or falls."""
    if not count:
        raise UserError(f"{name}.count", "[]", "at least one point is needed")
    if len(count) > MAX_POINTS:
        raise UserError(f"{name}.count", f"{len(count)} points", f"at most {MAX_POINTS}")
    for i, point in enumerate(count):
        if point < first or (i and point <= count[i - 1]):
            raise UserError(f"{name}.count[{i}]", point, f"whole numbers from {first} up, each above the one before")
        if point > MAX_TOKENS:
            raise UserError(f"{name}.count[{i}]", point, f"at most {MAX_TOKENS} tokens")
    for column, values in columns.items():
        if len(values) != len(count):
            raise UserError(f"{name}.{column}", f"{len(values)} values", f"one value a point ({len(count)}) is needed")
        seconds = np.asarray(values, dtype=np.float64)
        if seconds[0] >= 0.0 and seconds[-1] <= MAX_SECONDS and (seconds[1:] >= seconds[:-1]).all():
            continue  # so all are finite; the loop finds which one is not as it should be
        for i, value in enumerate(values):
            _check_seconds(f"{name}.{column}[{i}]", value)
            if i and value < values[i - 1]:
                allowed = f"time may not fall with more tokens (the point before has {values[i - 1]})"
                raise UserError(f"{name}.{column}[{i}]", value, allowed)

"""How long rounds take on a pipeline: the cost model of all stages, its file, and its vectorised evaluation.

Where a stage holds several groups of layers ("virtual stages"), each group has a `StageCost` of its own; with one group
a stage, stage and group are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from db.errors import UserError
from db.files.documents import located, of_schema, parse, read_json
from tuner.plan.stage_cost import (
    Floats,
    PairAttention,
    StageCost,
    TableAttention,
    check_seconds,
    scaled_stage,
    sum_of,
)
from tuner.plan.stage_order import StageOrder, stages_of_groups

SCHEMA = "isochunk.cost-model/1"
SCHEMA_2 = "isochunk.cost-model/2"  # written where a stage holds several groups of layers
MAX_STAGES = 1024
Ints = npt.NDArray[np.int64]


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
        check_seconds("hop.latency_s", self.hop_latency_s)
        check_seconds("hop.token_s", self.hop_token_s)
        check_seconds("return_s", self.return_s)
        places = dict[StageCost, int]()
        # Most equal stages are one object: comparing tables of hundreds of points takes longer.
        place_of = {
            key: places.setdefault(stage, len(places)) for key, stage in {id(x): x for x in self.stages}.items()
        }
        object.__setattr__(self, "kinds", tuple(places))
        object.__setattr__(self, "kind_of_stage", np.array([place_of[id(x)] for x in self.stages], dtype=np.int64))

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

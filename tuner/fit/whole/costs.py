"""From measured whole layers to the cost model of a pipeline: a curve over (chunk, context) for each kind of layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.model import WholeLayer
from profiler.model.whole.layer import Mixer
from profiler.points.point import BEFORE_LAYERS, Op
from profiler.points.whole_layers import whole_sizes, whole_variant
from profiler.sequence.kind import SequenceCut
from tuner.fit.attention.window import WindowCurve, fit_window
from tuner.fit.correction import Correction
from tuner.fit.curve import Curve, Floats, fit_line, fit_rows
from tuner.fit.holdout import UNTESTED, WIDEST_GAP, HeldOutError
from tuner.fit.layer_costs import LayerCosts, rising, table_grid
from tuner.fit.layer_fit import fit_hop
from tuner.fit.rank_skew import RankSkew
from tuner.fit.rows import RankWork, Rows, expected_s
from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.plan.stage_order import StageOrder, stages_of_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCurve:
    """Seconds of one layer of a kind: base(chunk) + slope(chunk) * context."""

    base: Curve
    slope: Curve

    @classmethod
    def fit(cls, rows: Sequence[Measurement]) -> KindCurve:
        """At each chunk a line over its contexts; both its numbers never fall from one chunk to the next."""
        by_chunk: dict[int, list[Measurement]] = {}
        for row in rows:
            by_chunk.setdefault(row.shape["chunk"], []).append(row)
        chunks, bases, slopes = sorted(by_chunk), [], []
        sloped = []
        for chunk in chunks:
            mine = by_chunk[chunk]
            contexts = [row.shape["context"] for row in mine]
            base_s, slope_s = fit_line(contexts, [expected_s(row) for row in mine])
            bases.append(base_s)
            if len(set(contexts)) > 1:
                sloped.append(chunk)
                slopes.append(slope_s)
        base = Curve(knots=np.array(chunks, dtype=np.float64), seconds=np.maximum.accumulate(bases))
        if not sloped:
            sloped, slopes = chunks[:1], [0.0]
        slope = Curve(knots=np.array(sloped, dtype=np.float64), seconds=np.maximum.accumulate(slopes))
        return cls(base=base, slope=slope)

    def __call__(self, chunk: float, context: float) -> float:
        """Seconds of a chunk after a context."""
        return float(self.base(chunk) + self.slope(chunk) * context)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeCosts:
    """Fitted costs of the layers of a model that are run as wholes, one request at a time, on one rank a stage."""

    work: RankWork
    kinds: Mapping[WholeLayer, KindCurve | WindowCurve]
    before: KindCurve
    """What a forward does once before a stage's layers, for each chunk."""
    embedding: Curve
    head_s: float
    hop_latency_s: float
    hop_byte_s: float
    return_s: float
    max_chunk: int
    max_context: int
    rank_skew: RankSkew = field(default_factory=RankSkew)
    correction: Correction = field(default_factory=Correction)
    virtual_stages: int = 1
    stage_order: StageOrder = StageOrder.LOOP

    def interleaved(self, virtual_stages: int, stage_order: StageOrder) -> WholeCosts:
        """The same costs where each stage holds so many groups of layers."""
        return replace(self, virtual_stages=virtual_stages, stage_order=stage_order)

    def with_links(self, factor: float) -> WholeCosts:
        """The same where all that is sent takes the `factor`-th part of its time; infinity: none."""
        return replace(
            self,
            hop_latency_s=self.hop_latency_s / factor,
            hop_byte_s=self.hop_byte_s / factor,
            return_s=self.return_s / factor,
        )

    def cost_model(self, layer_partition: Sequence[int], cut: SequenceCut | None = None) -> CostModel:
        """The cost model of groups of so many layers each: embedding in the first, head in the last."""
        pp_size, last = len(layer_partition) // self.virtual_stages, len(layer_partition) - 1
        placed = stages_of_groups(pp_size, self.virtual_stages, self.stage_order)

        @cache
        def stage_of(
            held: tuple[tuple[WholeLayer, int], ...], stage_scale: float, is_first: bool, is_last: bool
        ) -> StageCost:
            return self._stage(dict(held), stage_scale, is_first=is_first, is_last=is_last)

        stages, first = [], 0
        for group, (num_layers, stage) in enumerate(zip(layer_partition, placed, strict=True)):
            held = Counter(self._layers[first : first + num_layers])
            first += num_layers
            scale = self.correction.of_stage(pp_size, stage)
            stages.append(stage_of(tuple(held.items()), scale, group == 0, group == last))
        return CostModel(
            stages=tuple(stages),
            hop_latency_s=self.hop_latency_s,
            hop_token_s=self.hop_byte_s * self.work.hidden_bytes,
            return_s=self.return_s,
            virtual_stages=self.virtual_stages,
            stage_order=self.stage_order,
        )

    def floor_model(self, layer_partition: Sequence[int]) -> CostModel:
        """The same: there is one way to cut a round."""
        return self.cost_model(layer_partition)

    def least_layers(self, pp_size: int) -> tuple[StageCost, ...]:
        """A layer and the head on each of `pp_size` stages: at each point of the kind that costs least there."""
        grid = table_grid()
        points = grid.astype(np.float64)

        def least(scale: float) -> StageCost:
            base = np.min([curve.base(points) for curve in self.kinds.values()], axis=0)
            slope = np.min([curve.slope(points) for curve in self.kinds.values()], axis=0)
            return self._cost(scale, base=base, slope=slope, is_first=False, is_last=True)

        scales = [self.correction.of_stage(pp_size, stage) for stage in range(pp_size)]
        made = {scale: least(scale) for scale in dict.fromkeys(scales)}
        return tuple(made[scale] for scale in scales)

    def cut_layers(self, pp_size: int, stage: int) -> tuple[StageCost, ...]:
        """A layer on this stage, the mean of the model's kinds of layers: there is one way to cut a round."""
        layers, points = Counter(self._layers), table_grid().astype(np.float64)
        share = {layer: count / layers.total() for layer, count in layers.items()}
        base = np.sum([share[layer] * self.kinds[layer].base(points) for layer in layers], axis=0)
        slope = np.sum([share[layer] * self.kinds[layer].slope(points) for layer in layers], axis=0)
        scale = self.correction.of_stage(pp_size, stage)
        return (self._cost(scale, base=base, slope=slope, is_first=False, is_last=False),)

    @property
    def _layers(self) -> tuple[WholeLayer, ...]:
        return tuple(layer for layer in self.work.shape.every_layer if isinstance(layer, WholeLayer))

    def _stage(self, held: Mapping[WholeLayer, int], stage_scale: float, *, is_first: bool, is_last: bool) -> StageCost:
        points = table_grid().astype(np.float64)
        base, slope = self.before.base(points), self.before.slope(points)
        for layer, count in held.items():
            base = base + count * self.kinds[layer].base(points)
            slope = slope + count * self.kinds[layer].slope(points)
        return self._cost(stage_scale, base=base, slope=slope, is_first=is_first, is_last=is_last)

    def _cost(self, stage_scale: float, *, base: Floats, slope: Floats, is_first: bool, is_last: bool) -> StageCost:
        """Each request's chunk runs through the layers alone: what one token takes is paid for each chunk."""
        grid, correction = table_grid(), self.correction
        tokens_scale = stage_scale * correction.tokens_scale
        layers_scale = stage_scale * correction.attention_scale
        tokens = tokens_scale * (base - base[0])
        if is_first:
            tokens = tokens + tokens_scale * self.embedding(grid)
        return StageCost(
            token_count=(0, *grid.tolist()),
            token_seconds=rising([tokens[0], *tokens]),
            attention=TableAttention(
                count=tuple(grid.tolist()), base_s=(0.0,) * len(grid), context_s=rising(layers_scale * slope)
            ),
            round_overhead_s=stage_scale * correction.round_s,
            chunk_s=tokens_scale * float(base[0]),
            final_s=tokens_scale * self.head_s if is_last else 0.0,
        )


Costs = LayerCosts | WholeCosts


def fit_whole_costs(measurements: Sequence[Measurement] | Rows, work: RankWork, *, busy_ranks: int) -> WholeCosts:
    """Fit the rows of one hardware and dtype; raises `UserError` when a kind of layer has no rows."""
    rows, why, shape = Rows.of(measurements), str(work), work.shape
    found = {
        layer: _rows_of(rows, layer, busy_ranks, why) for layer in shape.every_kind if isinstance(layer, WholeLayer)
    }
    before = rows.require(
        Op.LAYER, {"hidden": shape.hidden_size}, busy_ranks=busy_ranks, variant=BEFORE_LAYERS, why=why
    )
    sends = []
    if busy_ranks > 1:
        sends = rows.require("send_recv", {}, busy_ranks=busy_ranks, group_size=2, why=f"the links of {why}")
    hop_latency_s, hop_byte_s = fit_hop(sends)
    embedding = rows.require(
        "embedding", {"hidden": shape.hidden_size, "vocab": shape.vocab_size}, busy_ranks=busy_ranks, why=why
    )
    head = rows.require(
        "head", {"hidden": shape.hidden_size, "vocab": work.vocab_slice}, busy_ranks=busy_ranks, why=why
    )
    for layer, mine in found.items():
        if len({row.shape["chunk"] for row in mine}) == 1:
            allowed = "the profile ended too early: the same isochunk profile command goes on with it"
            raise UserError("measurements", f"{layer.kind} at one chunk alone", allowed)
    return WholeCosts(
        work=work,
        kinds={layer: _curve(layer, mine, work) for layer, mine in found.items()},
        before=KindCurve.fit(before),
        embedding=fit_rows(embedding, "tokens"),
        head_s=float(fit_rows(head, "rows")(1)),
        hop_latency_s=hop_latency_s,
        hop_byte_s=hop_byte_s,
        return_s=min((expected_s(row) for row in sends), default=0.0),
        max_chunk=min(max(row.shape["chunk"] for row in mine) for mine in found.values()),
        max_context=min(max(row.shape["chunk"] + row.shape["context"] for row in mine) for mine in found.values()),
    )


def whole_held_out(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> list[HeldOutError]:
    """How far off each kind's curve is at chunks that it was fitted without, those between two others."""
    rows, found = Rows(measurements), []
    for layer in work.shape.every_kind:
        assert isinstance(layer, WholeLayer)
        mine = _rows_of(rows, layer, busy_ranks, str(work))
        chunks = sorted({row.shape["chunk"] for row in mine})
        errors = []
        for below, chunk, above in zip(chunks, chunks[1:], chunks[2:], strict=False):
            if above > WIDEST_GAP * below:
                continue
            curve = _curve(layer, [row for row in mine if row.shape["chunk"] != chunk], work)
            errors += [
                abs(float(curve(chunk, row.shape["context"])) / expected_s(row) - 1.0)
                for row in mine
                if row.shape["chunk"] == chunk and not row.noisy
            ]
        size = np.array(errors or [UNTESTED])
        found.append(
            HeldOutError(
                op=layer.kind, num_points=len(errors), median=float(np.median(size)), p90=float(np.quantile(size, 0.9)),
                worst=float(size.max()), of_layer=float(np.median(size)),
            )
        )  # fmt: skip
    return found


def _curve(layer: WholeLayer, rows: Sequence[Measurement], work: RankWork) -> KindCurve | WindowCurve:
    if layer.mixer is not Mixer.WINDOW or layer.window is None:
        return KindCurve.fit(rows)
    longest = work.longest_prompt or max(row.shape["chunk"] + row.shape["context"] for row in rows)
    return fit_window(rows, layer.window, longest=longest)


def _rows_of(rows: Rows, layer: WholeLayer, busy_ranks: int, why: str) -> list[Measurement]:
    return rows.require(
        Op.LAYER, whole_sizes(layer), busy_ranks=busy_ranks, variant=whole_variant(layer), why=f"{layer.kind} of {why}"
    )

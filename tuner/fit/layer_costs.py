"""The fitted costs of one layer, and the cost model of a pipeline made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from profiler.model import PRECISIONS, LayerSpec
from profiler.model.precision import FLOAT32
from profiler.points.kernel_choice import KernelChoice
from profiler.points.point import Op
from profiler.sequence.kind import CUTS, SequenceCut, usual_cut
from tuner.fit.attention.curve import SPLIT_ROWS, TILE_ROWS, AttentionCurve
from tuner.fit.attention.window import WindowCurve
from tuner.fit.calibration import Calibration
from tuner.fit.correction import Correction
from tuner.fit.curve import Curve, Floats
from tuner.fit.rank_skew import RankSkew
from tuner.fit.rows import RankWork
from tuner.fit.sequence.busiest import busiest_share
from tuner.fit.sequence.cut_costs import CutCosts
from tuner.fit.sequence.kinds import COSTS
from tuner.fit.sequence.messages import layer_weight_bytes, row_bytes
from tuner.fit.sequence.overlap import COPIED, Overlap
from tuner.fit.sequence.parts import ExchangeParts, LayerParts, Seconds
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Weights
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.plan.stage_order import StageOrder, stages_of_groups

# Points of the tables that the planner reads: dense where chunks are likely, a few percent apart beyond.
DENSE_STEP, DENSE_END, MIDDLE_STEP, MIDDLE_END = SPLIT_ROWS, 4096, TILE_ROWS, 16384
SPARSE_RATIO, TABLE_END = 1.05, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Fitted costs of one layer and of what surrounds the layers, on one rank of a stage of `work`."""

    work: RankWork
    projections: tuple[Curve, ...]
    """Seconds of each matmul at the rows that a rank runs, and of routed experts if there are any."""
    elementwise: Curve
    all_reduce: Curve | None
    """Seconds at a message's bytes; two a layer when tp_size > 1."""
    attention: AttentionCurve | WindowCurve
    """With the heads that a rank attends with."""
    kernels: KernelChoice
    """The attention kernel of each chunk that these costs hold for."""
    calibration: Calibration
    messages: Mapping[Op, Curve]
    """Collectives between the ranks that share the rows of a round, by a message's bytes."""
    overlap: Overlap
    """The slowdown of collectives and products that run at the same time."""
    embedding: Curve
    head_s: float
    round_overhead_s: float
    chunk_s: float
    hop_latency_s: float
    hop_byte_s: float
    return_s: float
    rank_skew: RankSkew
    correction: Correction
    max_chunk: int
    """The largest chunk that all parts of a layer were measured at; plans beyond it are extrapolated."""
    max_context: int
    """The longest context measured."""
    others: Mapping[LayerSpec, LayerCosts] = field(default_factory=dict)
    """The same of the model's other kinds of layers, of which only the layers' own costs count."""
    virtual_stages: int = 1
    """Groups of layers that a stage holds in the cost models that are made."""
    stage_order: StageOrder = StageOrder.LOOP
    _tables: dict[tuple[float, SequenceCut | None, bool], tuple[Floats, Floats, Floats]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache of `_layer_tables`."""
    _cuts: dict[tuple[float, SequenceCut], CutCosts] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Cache of `cut_costs`."""

    def interleaved(self, virtual_stages: int, stage_order: StageOrder) -> LayerCosts:
        """The same costs with several groups of layers a stage."""
        other = replace(self, virtual_stages=virtual_stages, stage_order=stage_order)
        for cache_of_one_layer in ("_tables", "_cuts"):  # the same however layers are grouped
            object.__setattr__(other, cache_of_one_layer, getattr(self, cache_of_one_layer))
        return other

    @property
    def kinds(self) -> tuple[LayerCosts, ...]:
        """Costs of each kind of layer."""
        return (self, *self.others.values())

    def changed(self, change: Callable[[LayerCosts], LayerCosts]) -> LayerCosts:
        """The same where a change applies to each kind of layer."""
        return replace(change(self), others={layer: change(costs) for layer, costs in self.others.items()})

    def with_links(self, factor: float) -> LayerCosts:
        """The same costs with all communication `factor` times as fast; infinity makes it free."""
        if factor == 1.0:
            return self

        def shorter(curve: Curve) -> Curve:
            return replace(curve, seconds=curve.seconds / factor)

        return replace(
            self,
            others={layer: costs.with_links(factor) for layer, costs in self.others.items()},
            all_reduce=None if self.all_reduce is None else shorter(self.all_reduce),
            messages={op: shorter(curve) for op, curve in self.messages.items()},
            hop_latency_s=self.hop_latency_s / factor,
            hop_byte_s=self.hop_byte_s / factor,
            return_s=self.return_s / factor,
        )

    def compute_s(self, tokens: Floats) -> Floats:
        """Token-wise seconds of a layer without collectives: matmuls and element-wise work, uncalibrated."""
        return _sum_s(self.projections, tokens) + self.elementwise(tokens)

    def cut_costs(self, cut: SequenceCut | None = None, *, skew: float = 1.0) -> CutCosts:
        """What a cut of this kind costs in a layer, at the rank's skew; left out, the usual cut."""
        kind = self.work.sp_kind
        key = skew, cut or usual_cut(kind)
        if key not in self._cuts:
            self._cuts[key] = COSTS[kind, key[1]](self._parts(skew))
        return self._cuts[key]

    def tokens_s(self, tokens: Floats, skew: float = 1.0, cut: SequenceCut | None = None) -> Floats:
        """Token-wise seconds of a layer: calibrated compute at the rank's skew, collectives, and what gathering the
        next layer's weights adds.

        These may hide behind attention, too: only token-wise work, which every round has, is counted on.
        """
        seconds = self.cut_costs(cut, skew=skew).tokens_s(tokens)
        if self.work.weights is Weights.GATHERED:
            gather_s = self.messages[Op.ALL_GATHER](layer_weight_bytes(self.work))
            seconds = self.overlap.together(seconds, gather_s)
        return seconds

    def cost_model(self, layer_partition: Sequence[int], cut: SequenceCut | None = None) -> CostModel:
        """The cost model of groups of so many layers each: embedding in the first, head in the last.

        cut: of every round; left out, the usual one of the kind.
        """
        return self._model(layer_partition, cut or usual_cut(self.work.sp_kind), least=False)

    def floor_model(self, layer_partition: Sequence[int]) -> CostModel:
        """A cost model below that of every cut: lower bounds are proven on it where cuts may be chosen.

        Of every table the least of all cuts at each point.
        """
        models = [self._model(layer_partition, cut, least=True) for cut in CUTS[self.work.sp_kind]]
        if len(models) == 1:
            return models[0]
        return replace(
            models[0],
            stages=tuple(_least_stage(stages) for stages in zip(*(model.stages for model in models), strict=True)),
            hop_token_s=min(model.hop_token_s for model in models),
        )

    def _model(self, layer_partition: Sequence[int], cut: SequenceCut, *, least: bool) -> CostModel:
        pp_size, last = len(layer_partition) // self.virtual_stages, len(layer_partition) - 1

        @cache
        def stage_of(
            held: tuple[tuple[int, int], ...], skew: float, scale: float, first: bool, last: bool
        ) -> StageCost:
            return self._stage(held, skew, scale, first=first, last=last, cut=cut, least=least)

        placed = stages_of_groups(pp_size, self.virtual_stages, self.stage_order)
        stages = tuple(
            stage_of(
                held,
                self.rank_skew.of_stage(stage, self.work.stage_size),
                self.correction.of_stage(pp_size, stage),
                group == 0,
                group == last,
            )
            for group, (held, stage) in enumerate(zip(self._held(layer_partition), placed, strict=True))
        )
        sharing = 1 if cut is SequenceCut.WHOLE else self.work.sequence_size  # a rank hands on its own rows
        return CostModel(
            stages=stages,
            hop_latency_s=self.hop_latency_s,
            hop_token_s=self.hop_byte_s * self.work.hidden_bytes / sharing,
            return_s=self.return_s,
            virtual_stages=self.virtual_stages,
            stage_order=self.stage_order,
        )

    def _held(self, layer_partition: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
        """The layers of each group: (place in `kinds`, how many). Partitions of more layers than there are begin again
        with the first.
        """
        if not self.others:
            yield from (((0, num_layers),) for num_layers in layer_partition)
            return
        place = {layer: index for index, layer in enumerate([self.work.layer, *self.others])}
        layers, first = [place[layer] for layer in self.work.shape.layers], 0
        for num_layers in layer_partition:
            held = Counter(layers[index % len(layers)] for index in range(first, first + num_layers))
            first += num_layers
            yield tuple(held.items())

    def least_layers(self, pp_size: int) -> tuple[StageCost, ...]:
        """The least cost over all cuts of a layer and the head on each of `pp_size` stages; equal stages share one."""

        def least(skew: float, scale: float) -> StageCost:
            return _least_stage([
                self._stage([(kind, 1)], skew, scale, first=False, last=True, cut=cut, least=True)
                for cut in CUTS[self.work.sp_kind]
                for kind in range(len(self.kinds))
            ])  # fmt: skip

        places = [
            (self.rank_skew.of_stage(stage, self.work.stage_size), self.correction.of_stage(pp_size, stage))
            for stage in range(pp_size)
        ]
        kinds = {place: least(*place) for place in dict.fromkeys(places)}
        return tuple(kinds[place] for place in places)

    def cut_layers(self, pp_size: int, stage: int) -> tuple[StageCost, ...]:
        """A layer on this stage in each cut of a round, the mean of the model's kinds of layers."""
        layers = Counter(self.work.shape.layers) if self.others else {self.work.layer: 1}
        total = sum(layers.values())
        held = [(place, layers[layer] / total) for place, layer in enumerate([self.work.layer, *self.others])]
        skew, scale = self.rank_skew.of_stage(stage, self.work.stage_size), self.correction.of_stage(pp_size, stage)
        return tuple(
            self._stage(held, skew, scale, first=False, last=False, cut=cut) for cut in CUTS[self.work.sp_kind]
        )

    def _stage(
        self,
        held: Iterable[tuple[int, float]],
        skew: float,
        stage_scale: float,
        *,
        first: bool,
        last: bool,
        cut: SequenceCut | None = None,
        least: bool = False,
    ) -> StageCost:
        grid, costs = table_grid(), self.cut_costs(cut)
        kinds = self.kinds
        tables = [np.stack(kinds[kind]._layer_tables(skew, cut, least)) * count for kind, count in held]
        tokens, base_s, slope_s = np.sum(tables, axis=0)
        scale = stage_scale * self.correction.tokens_scale
        if first:
            tokens = tokens + self.embedding(self._own_rows(grid.astype(np.float64), cut))
        tokens = scale * tokens
        attention_scale = skew * stage_scale * self.correction.attention_scale
        return StageCost(
            token_count=(0, *_grid_points()),
            token_seconds=rising([tokens[0], *tokens]),
            attention=TableAttention(
                count=_grid_points(),
                base_s=rising(attention_scale * base_s),
                context_s=rising(attention_scale * slope_s),
            ),
            round_overhead_s=scale * self.round_overhead_s + stage_scale * self.correction.round_s,
            chunk_s=scale * self.chunk_s * (1 if least else costs.calls_a_chunk),
            final_s=scale * (self.head_s + self._final_rows_s()) if last else 0.0,
        )

    def _layer_tables(self, skew: float, cut: SequenceCut | None, least: bool) -> tuple[Floats, Floats, Floats]:
        """Seconds of a layer at the grid's points: token-wise, attention to the chunk, and to a token of context."""
        if (key := (skew, cut, least)) not in self._tables:
            points, costs = table_grid().astype(np.float64), self.cut_costs(cut)
            base_s, slope_s = (costs.least_base_s, costs.least_slope_s) if least else (costs.base_s, costs.slope_s)
            self._tables[key] = self.tokens_s(points, skew, cut), base_s(points), slope_s(points)
        return self._tables[key]

    def _own_rows(self, tokens: Floats, cut: SequenceCut | None) -> Floats:
        """Rows of the residual stream that a rank holds."""
        return tokens if cut is SequenceCut.WHOLE else np.ceil(tokens / self.work.sequence_size)

    def _final_rows_s(self) -> float:
        """Seconds to send a prompt's last row from the rank that ran it to the ranks that share the rows."""
        small = self.messages.get(Op.ALL_REDUCE)
        return float(small(self.work.hidden_bytes)) if small else 0.0

    def _parts(self, skew: float) -> LayerParts:
        calibration = self.calibration
        sizes = self.work.layer_sizes
        n_queries, n_all = sizes["heads"] * sizes["head_dim"], self.work.projections[0][0]
        # Numbers a token that the element-wise work reads and writes, as the grid counts them.
        width = 4 * sizes["hidden"] + 3 * sizes["intermediate"] + 3 * n_queries
        squares, hidden = self.work.squares_bytes, self.work.reduced_bytes

        def calibrated(curve: Seconds, share: float = 1.0) -> Seconds:
            return lambda rows: share * skew * curve(rows) * calibration.tokens_factor(rows)

        exchanged, exchange, token_wise = self.work.exchanged, None, self.compute_s
        if exchanged is not None:
            *others, experts = self.projections
            of_own_rows = others[-len(exchanged.linears) :]
            sent = busiest_share(exchanged)
            exchange = ExchangeParts(
                experts_s=calibrated(experts),
                own_rows_s=calibrated(lambda rows: _sum_s(of_own_rows, rows)),
                row_bytes=sent * self.work.hidden_bytes,
                choice_bytes=sent * FLOAT32.num_bytes(2 * exchanged.router.per_token),
                is_beside=exchanged.beside > 1,
            )

            def token_wise(tokens: Floats) -> Floats:
                return _sum_s(others, tokens) + self.elementwise(tokens)

        return LayerParts(
            size=self.work.sequence_size,
            token_wise_s=calibrated(token_wise),
            elementwise_s=calibrated(self.elementwise),
            queries_s=calibrated(self.projections[0], n_queries / n_all),
            reduce_s=lambda rows: self._reduced_s(rows, hidden),
            squares_s=lambda rows: self._reduced_s(rows, squares),
            base_s=lambda chunk: calibration.base_factor(chunk) * self.attention.base(chunk),
            slope_s=lambda chunk: calibration.context_factor(chunk) * self.attention.slope(chunk),
            messages=self.messages,
            row_bytes=row_bytes(self.work),
            norms_share=4 * sizes["hidden"] / width,
            traffic_bytes=PRECISIONS[self.work.dtype].activations.num_bytes(width),
            overlap=self.overlap,
            gather_overlap=COPIED if self.work.has_peer_memory else self.overlap,
            exchange=exchange,
        )

    def _reduced_s(self, rows: Floats, sizes: Sequence[int]) -> Floats:
        """Sums over the tensor-parallel group of so many bytes a row each."""
        if self.all_reduce is None:
            return np.zeros_like(rows)
        return np.asarray(sum((self.all_reduce(rows * size) for size in sizes), start=np.zeros_like(rows)))


def _sum_s(curves: Sequence[Curve], tokens: Floats) -> Floats:
    """The sum of several products of as many rows."""
    return np.asarray(sum(curve(tokens) for curve in curves))


def _least_stage(stages: Sequence[StageCost]) -> StageCost:
    """At each point the least of stages whose tables have the same points."""
    attentions = [stage.attention for stage in stages]
    tables = [attention for attention in attentions if isinstance(attention, TableAttention)]

    def least(columns: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(map(min, zip(*columns, strict=True)))

    return replace(
        stages[0],
        token_seconds=least([stage.token_seconds for stage in stages]),
        attention=TableAttention(
            count=tables[0].count,
            base_s=least([table.base_s for table in tables]),
            context_s=least([table.context_s for table in tables]),
        ),
        chunk_s=min(stage.chunk_s for stage in stages),
    )


@cache
def table_grid() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Token counts at which the planner's tables hold a value, up to a million."""
    steps = range(DENSE_STEP, DENSE_END + 1, DENSE_STEP)
    # One token more than fills its tiles starts another one.
    dense = np.array(sorted({1, 8, 16, 32, *steps, *(step + 1 for step in steps)}))
    middle = np.arange(DENSE_END + MIDDLE_STEP, MIDDLE_END + 1, MIDDLE_STEP)
    num_sparse = int(np.ceil(np.log(TABLE_END / MIDDLE_END) / np.log(SPARSE_RATIO)))
    sparse = np.geomspace(MIDDLE_END, TABLE_END, num_sparse + 1)[1:].round().astype(np.int64)
    grid = np.concatenate([dense, middle, sparse])
    grid.flags.writeable = False
    return grid


@cache
def _grid_points() -> tuple[int, ...]:
    return tuple(table_grid().tolist())


def rising(seconds: Floats | Sequence[float]) -> tuple[float, ...]:
    """Time never falls with more tokens; where two fits cross, the larger value holds."""
    return tuple(np.maximum.accumulate(np.asarray(seconds, dtype=np.float64)).tolist())

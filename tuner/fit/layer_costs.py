"""From measured rows to the cost of a layer, and from layers to the cost model of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.points.point import RANK_LAYER
from tuner.fit.attention_fit import SPLIT_ROWS, TILE_ROWS, AttentionCurve
from tuner.fit.attention_rows import AttentionRows
from tuner.fit.calibration import Calibration, fit_calibration
from tuner.fit.correction import Correction
from tuner.fit.curve import Curve, Floats, fit_curve, fit_line, without_spikes
from tuner.fit.rank_skew import RankSkew, fit_rank_skew
from tuner.fit.rows import RankWork, Rows, expected_s
from tuner.plan.cost_model import CostModel, StageCost, TableAttention

# Points of the tables that the planner reads: dense where chunks are likely, a few percent apart beyond.
DENSE_STEP, DENSE_END, MIDDLE_STEP, MIDDLE_END = SPLIT_ROWS, 4096, TILE_ROWS, 16384
SPARSE_RATIO, TABLE_END = 1.05, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Fitted costs of one layer and of what surrounds the layers, on one rank of `work.tp_size`."""

    work: RankWork
    projections: tuple[Curve, ...]
    """Seconds of each of the four matmuls at the tokens of a round."""
    elementwise: Curve
    all_reduce: Curve | None
    """Seconds at a message's bytes; two a layer when tp_size > 1."""
    attention: AttentionCurve
    calibration: Calibration
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

    def compute_s(self, tokens: Floats) -> Floats:
        """Token-wise seconds of a layer without collectives: matmuls and element-wise work, uncalibrated."""
        return np.asarray(sum(curve(tokens) for curve in self.projections)) + self.elementwise(tokens)

    def tokens_s(self, tokens: Floats, skew: float = 1.0) -> Floats:
        """Token-wise seconds of a layer: calibrated compute at the rank's skew, and with tensor parallelism its
        all-reduces."""
        seconds = skew * self.compute_s(tokens) * self.calibration.tokens_factor(tokens)
        if self.all_reduce is not None:
            seconds = seconds + sum(self.all_reduce(tokens * size) for size in self.work.reduced_bytes)
        return seconds

    def cost_model(self, layer_partition: Sequence[int]) -> CostModel:
        """The cost model of stages of so many layers each: embedding on the first, head on the last."""
        pp_size = len(layer_partition)
        stages = tuple(
            self._stage(
                num_layers,
                self.rank_skew.of_stage(stage, self.work.tp_size),
                self.correction.of_stage(pp_size, stage),
                first=stage == 0,
                last=stage == pp_size - 1,
            )
            for stage, num_layers in enumerate(layer_partition)
        )
        return CostModel(
            stages=stages,
            hop_latency_s=self.hop_latency_s,
            hop_token_s=self.hop_byte_s * self.work.hidden_bytes,
            return_s=self.return_s,
        )

    def _stage(self, num_layers: int, skew: float, stage_scale: float, *, first: bool, last: bool) -> StageCost:
        grid = table_grid()
        points = grid.astype(np.float64)
        scale = stage_scale * self.correction.tokens_scale
        tokens = num_layers * self.tokens_s(points, skew)
        if first:
            tokens = tokens + self.embedding(points)
        tokens = scale * tokens
        attention_scale = num_layers * skew * stage_scale * self.correction.attention_scale
        return StageCost(
            token_count=(0, *grid.tolist()),
            token_seconds=_rising([tokens[0], *tokens]),
            attention=TableAttention(
                count=tuple(grid.tolist()),
                base_s=_rising(attention_scale * self.calibration.base_factor(points) * self.attention.base(points)),
                context_s=_rising(
                    attention_scale * self.calibration.context_factor(points) * self.attention.slope(points)
                ),
            ),
            round_overhead_s=scale * self.round_overhead_s + stage_scale * self.correction.round_s,
            chunk_s=scale * self.chunk_s,
            final_s=scale * self.head_s if last else 0.0,
        )


def fit_layer_costs(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> LayerCosts:
    """Fit the rows of one hardware and dtype; raises `UserError` when a part has no rows.

    busy_ranks: ranks at work at once when the plan runs; rows taken under the nearest such load are used.
    """
    rows = Rows(measurements)
    why = f"{work.shape.name} at tp_size {work.tp_size} in {work.dtype}"
    attention = AttentionRows(
        rows.require("attention", work.attention_sizes, busy_ranks=busy_ranks, variant=None, why=why), work
    )

    def curve(op: str, sizes: dict[str, int], at: str, variant: str = "") -> Curve:
        found = rows.require(op, sizes, busy_ranks=busy_ranks, variant=variant, why=why)
        return fit_rows(found, at, ranks=work.tp_size)

    max_chunk = _most_tokens(rows, work, busy_ranks, [row.shape["chunk"] for row in attention.chosen])
    overhead_rows = rows.require("round_overhead", {}, busy_ranks=busy_ranks, why=why)
    overhead_s, chunk_s = fit_line(
        [row.shape["chunks"] - 1 for row in overhead_rows], list(map(expected_s, overhead_rows))
    )
    sends = []
    if busy_ranks > work.tp_size:  # there are stages
        sends = rows.require("send_recv", {}, busy_ranks=busy_ranks, group_size=2, why=f"the links of {why}")
    hop_latency_s, hop_byte_s = _fit_hop(sends)
    shape = work.shape
    costs = LayerCosts(
        work=work,
        projections=tuple(curve("matmul", {"n": n, "k": k}, "m") for n, k in work.projections),
        elementwise=curve("elementwise", work.layer_sizes, "tokens", work.layer_variant),
        all_reduce=_all_reduce(rows, work, busy_ranks, why),
        attention=attention.fit(attention.chosen),
        calibration=Calibration.none(),
        rank_skew=RankSkew(),
        correction=Correction(),
        embedding=curve("embedding", {"hidden": shape.hidden_size, "vocab": shape.vocab_size}, "tokens"),
        head_s=float(curve("head", {"hidden": shape.hidden_size, "vocab": work.vocab_slice}, "rows")(1)),
        round_overhead_s=overhead_s,
        chunk_s=chunk_s,
        hop_latency_s=hop_latency_s,
        hop_byte_s=hop_byte_s,
        return_s=min((expected_s(row) for row in sends), default=0.0),
        max_chunk=max_chunk,
        max_context=max(row.shape["context"] + row.shape["chunk"] for row in attention.chosen),
    )
    whole_layers, of_ranks = (
        rows.select(op, work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
        for op in ("layer", RANK_LAYER)
    )
    calibration = fit_calibration(costs.compute_s, costs.attention, whole_layers, ranks=work.tp_size)
    return replace(costs, calibration=calibration, rank_skew=fit_rank_skew(of_ranks))


def fit_rows(rows: Sequence[Measurement], at: str, *, ranks: int = 1) -> Curve:
    """The curve of what rows are expected to cost over one of their sizes, single disturbed points smoothed."""
    sizes = [row.shape[at] for row in rows]
    return fit_curve(sizes, without_spikes(sizes, [expected_s(row, ranks=ranks) for row in rows]))


def table_grid() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Token counts at which the planner's tables hold a value, up to a million."""
    steps = range(DENSE_STEP, DENSE_END + 1, DENSE_STEP)
    # One token more than fills its tiles starts another one.
    dense = np.array(sorted({1, 8, 16, 32, *steps, *(step + 1 for step in steps)}))
    middle = np.arange(DENSE_END + MIDDLE_STEP, MIDDLE_END + 1, MIDDLE_STEP)
    num_sparse = int(np.ceil(np.log(TABLE_END / MIDDLE_END) / np.log(SPARSE_RATIO)))
    sparse = np.geomspace(MIDDLE_END, TABLE_END, num_sparse + 1)[1:].round().astype(np.int64)
    return np.concatenate([dense, middle, sparse])


def _most_tokens(rows: Rows, work: RankWork, busy_ranks: int, chunks: Sequence[int]) -> int:
    """The most tokens that all parts of a layer were measured at; raises `UserError` if a part has one size alone."""
    sizes = {
        f"matmul n={n} k={k}": [
            row.shape["m"] for row in rows.select("matmul", {"n": n, "k": k}, busy_ranks=busy_ranks)
        ]
        for n, k in work.projections
    }
    found = rows.select("elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    sizes |= {"elementwise": [row.shape["tokens"] for row in found], "attention": list(chunks)}
    reached = {name: max(tokens, default=0) for name, tokens in sizes.items()}
    for name, tokens in sizes.items():
        if len(set(tokens)) == 1 and reached[name] < max(reached.values()):
            allowed = "the profile ended too early: the same isochunk profile command goes on with it"
            raise UserError("measurements", f"{name} at {reached[name]} tokens alone", allowed)
    return min(reached.values())


def _all_reduce(rows: Rows, work: RankWork, busy_ranks: int, why: str) -> Curve | None:
    if work.tp_size == 1:
        return None
    found = rows.require("all_reduce", {}, busy_ranks=busy_ranks, group_size=work.tp_size, why=why)
    return fit_rows(found, "bytes")


def _fit_hop(sends: Sequence[Measurement]) -> tuple[float, float]:
    return fit_line([row.shape["bytes"] for row in sends], [expected_s(row) for row in sends]) if sends else (0.0, 0.0)


def _rising(seconds: Floats | Sequence[float]) -> tuple[float, ...]:
    """Time never falls with more tokens; where two fits cross, the larger value holds."""
    return tuple(np.maximum.accumulate(np.asarray(seconds, dtype=np.float64)).tolist())

"""Fits the costs of a layer, of what surrounds the layers and of hand-offs to measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.points.point import RANK_LAYER
from tuner.fit.attention.rows import AttentionRows, require_attention
from tuner.fit.calibration import Calibration, fit_calibration
from tuner.fit.correction import Correction
from tuner.fit.curve import Curve, fit_line, fit_means, fit_rows
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.rank_skew import RankSkew, fit_rank_skew
from tuner.fit.rows import RankWork, Rows, expected_s
from tuner.fit.sequence.messages import fit_messages, fit_overlap


def fit_layer_costs(measurements: Sequence[Measurement] | Rows, work: RankWork, *, busy_ranks: int) -> LayerCosts:
    """Fit the rows of one hardware and dtype; raises `UserError` when a part has no rows.

    busy_ranks: ranks at work at once when the plan runs; rows taken under the nearest such load are used.
    """
    rows = Rows.of(measurements)
    first, *others = (_fit_kind(rows, kind, busy_ranks=busy_ranks) for kind in work.kinds)
    if not others:
        return first
    return replace(
        first,
        others={costs.work.layer: costs for costs in others},
        max_chunk=min(costs.max_chunk for costs in (first, *others)),
        max_context=min(costs.max_context for costs in (first, *others)),
    )


def _fit_kind(rows: Rows, work: RankWork, *, busy_ranks: int) -> LayerCosts:
    """Costs of the work's kind of layer."""
    why, ranks = str(work), work.stage_size
    projections, elementwise = _token_wise(rows, work, busy_ranks)
    attention = AttentionRows(require_attention(rows, work, busy_ranks=busy_ranks, why=why), work)

    def curve(op: str, sizes: dict[str, int], at: str) -> Curve:
        return fit_rows(rows.require(op, sizes, busy_ranks=busy_ranks, why=why), at, ranks=ranks)

    overhead_rows = rows.require("round_overhead", {}, busy_ranks=busy_ranks, why=why)
    overhead_s, chunk_s = fit_line(
        [row.shape["chunks"] - 1 for row in overhead_rows], list(map(expected_s, overhead_rows))
    )
    sends = []
    if busy_ranks > ranks:  # there are stages
        sends = rows.require("send_recv", {}, busy_ranks=busy_ranks, group_size=2, why=f"the links of {why}")
    hop_latency_s, hop_byte_s = fit_hop(sends)
    shape = work.shape
    costs = LayerCosts(
        work=work,
        projections=projections,
        elementwise=elementwise,
        all_reduce=_all_reduce(rows, work, busy_ranks, why),
        attention=attention.fit(attention.chosen),
        kernels=attention.choose,
        calibration=Calibration.none(),
        messages=fit_messages(rows, work, busy_ranks=busy_ranks, why=why),
        overlap=fit_overlap(rows, work, busy_ranks=busy_ranks),
        rank_skew=RankSkew(),
        correction=Correction(),
        embedding=curve("embedding", {"hidden": shape.hidden_size, "vocab": shape.vocab_size}, "tokens"),
        head_s=float(curve("head", {"hidden": shape.hidden_size, "vocab": work.vocab_slice}, "rows")(1)),
        round_overhead_s=overhead_s,
        chunk_s=chunk_s,
        hop_latency_s=hop_latency_s,
        hop_byte_s=hop_byte_s,
        return_s=min((expected_s(row) for row in sends), default=0.0),
        max_chunk=_largest_chunk(rows, work, busy_ranks, [row.shape["chunk"] for row in attention.chosen]),
        max_context=max(row.shape["context"] + row.shape["chunk"] for row in attention.chosen),
    )
    of_ranks = rows.select(RANK_LAYER, work.whole_layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    calibration = _calibration(rows, costs, busy_ranks)
    return replace(costs, calibration=calibration, rank_skew=fit_rank_skew(of_ranks))


def _calibration(rows: Rows, costs: LayerCosts, busy_ranks: int) -> Calibration:
    """A rank's factors by whole layers, which a profile holds of tensor-parallel ranks: its rows are such a layer's.

    Where heads are cut for attention alone, its factors are those of layers with as few heads if some were measured.
    """
    work = costs.work
    if work.attending_size == work.tp_size:
        return _layers_calibration(rows, costs, busy_ranks)
    own = work.without_sequence
    token_wise = _layers_calibration(rows, _refitted(rows, costs, own, busy_ranks), busy_ranks)
    try:
        few_heads = _refitted(rows, costs, replace(own, tp_size=work.attending_size), busy_ranks)
    except UserError:
        return token_wise
    return token_wise.with_attention_of(_layers_calibration(rows, few_heads, busy_ranks))


def _refitted(rows: Rows, costs: LayerCosts, work: RankWork, busy_ranks: int) -> LayerCosts:
    """The costs with the parts of a layer refitted for other work."""
    projections, elementwise = _token_wise(rows, work, busy_ranks)
    attention = AttentionRows(require_attention(rows, work, busy_ranks=busy_ranks, why=str(work)), work)
    return replace(
        costs,
        work=work,
        projections=projections,
        elementwise=elementwise,
        attention=attention.fit(attention.chosen),
    )


def _token_wise(rows: Rows, work: RankWork, busy_ranks: int) -> tuple[tuple[Curve, ...], Curve]:
    """Curves of the matmuls, of routed experts if there are any, and of the element-wise work."""
    products = [
        rows.require("matmul", sizes, busy_ranks=busy_ranks, variant=variant, why=str(work))
        for sizes, variant in work.projection_rows
    ]
    elementwise = rows.require(
        "elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant, why=str(work)
    )
    ranks = work.stage_size
    curves = [fit_rows(found, "m", ranks=ranks) for found in products]
    if work.layer.experts is not None:
        routed = rows.require("experts", work.expert_sizes, busy_ranks=busy_ranks, variant=None, why=str(work))
        curves.append(fit_means(routed, "tokens", ranks=ranks))  # of the spreads over experts that were measured
    return tuple(curves), fit_rows(elementwise, "tokens", ranks=ranks)


def _layers_calibration(rows: Rows, costs: LayerCosts, busy_ranks: int) -> Calibration:
    work = costs.work
    layers = rows.select("layer", work.whole_layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    return fit_calibration(costs.compute_s, costs.attention, layers, ranks=work.stage_size)


def _largest_chunk(rows: Rows, work: RankWork, busy_ranks: int, chunks: Sequence[int]) -> int:
    """The largest chunk whose share all parts of a layer were measured at: a rank has a part of its rows, and attends
    to it in as large pieces unless heads are cut.

    Raises `UserError` if a part has one size alone.
    """
    sizes = {
        f"matmul n={size['n']} k={size['k']}{variant and ' ' + variant}": [
            row.shape["m"] for row in rows.select("matmul", size, busy_ranks=busy_ranks, variant=variant)
        ]
        for size, variant in work.projection_rows
    }
    found = rows.select("elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    sizes |= {"elementwise": [row.shape["tokens"] for row in found], "attention": list(chunks)}
    reached = {name: max(tokens, default=0) for name, tokens in sizes.items()}
    for name, tokens in sizes.items():
        if len(set(tokens)) == 1 and reached[name] < max(reached.values()):
            allowed = "the profile ended too early: the same isochunk profile command goes on with it"
            raise UserError("measurements", f"{name} at {reached[name]} tokens alone", allowed)
    attends_whole = work.attending_size != work.tp_size
    return min(
        tokens * (1 if name == "attention" and attends_whole else work.sp_size) for name, tokens in reached.items()
    )


def _all_reduce(rows: Rows, work: RankWork, busy_ranks: int, why: str) -> Curve | None:
    if work.tp_size == 1:
        return None
    found = rows.require("all_reduce", {}, busy_ranks=busy_ranks, group_size=work.tp_size, why=why)
    return fit_rows(found, "bytes")


def fit_hop(sends: Sequence[Measurement]) -> tuple[float, float]:
    """Latency and seconds a byte of messages between stages; nothing where there are none."""
    return fit_line([row.shape["bytes"] for row in sends], [expected_s(row) for row in sends]) if sends else (0.0, 0.0)

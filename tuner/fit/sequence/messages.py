"""Measured collectives between the ranks that share a round's rows, and how they and products slow each other down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from db.rows.measurements import Measurement
from profiler.model import PRECISIONS
from profiler.model.precision import FLOAT32
from profiler.points.point import BESIDE, Op, strided
from profiler.sequence.kind import SPKind
from tuner.fit.curve import Curve, fit_line, fit_rows
from tuner.fit.rows import RankWork, Rows, expected_s
from tuner.fit.sequence.busiest import busiest_share
from tuner.fit.sequence.kinds import MESSAGES
from tuner.fit.sequence.overlap import APART, ON_A_CARD, Overlap
from tuner.fit.sequence.parts import RowBytes
from tuner.plan.plan import Weights

_LEAST_ROWS = 2  # of messages or products beside one another, for a median to count


def row_bytes(work: RankWork) -> RowBytes:
    """What messages carry of one row of a rank."""
    attention, number_bytes = work.layer.attention, PRECISIONS[work.dtype].activations.num_bytes
    heads, of_rank = attention.sizes(work.tp_size), work.attention_sizes
    attended = heads["heads"] * heads["head_dim"]
    repeated_kv = max(heads["kv_heads"], work.sp_size * of_rank["kv_heads"]) * heads["head_dim"]
    return RowBytes(
        hidden=work.hidden_bytes,
        kv=number_bytes(attention.kv_elements(work.tp_size)),
        ulysses_in=number_bytes(attended + 2 * repeated_kv),
        attended=number_bytes(attended),
        attended_float32=FLOAT32.num_bytes(attended),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMessage:
    """A collective that a layer does `count` times between the ranks that share the rows."""

    op: Op
    token_bytes: float
    """Bytes of the message for each token that the layer's products run on a rank."""
    count: int


def layer_messages(work: RankWork) -> tuple[LayerMessage, ...]:
    """The collectives of a layer whose size goes with the rows of a round; what a ring passes goes with the context."""
    size, carried, exchanged = work.sequence_size, row_bytes(work), work.exchanged
    sent = tuple[LayerMessage, ...]()
    if exchanged is not None:
        products_rows = 1 if work.sp_kind is SPKind.MEGATRON else size
        token_bytes = busiest_share(exchanged) * carried.hidden * products_rows
        sent = (LayerMessage(op=Op.ALL_TO_ALL, token_bytes=token_bytes, count=2),)
    match work.sp_kind:
        case SPKind.GATHER:
            return LayerMessage(op=Op.ALL_GATHER, token_bytes=size * carried.kv, count=1), *sent
        case SPKind.ULYSSES:
            mean = (carried.ulysses_in + carried.attended) / 2
            return LayerMessage(op=Op.ALL_TO_ALL, token_bytes=mean, count=2), *sent
        case SPKind.MEGATRON:
            ops, count = (Op.ALL_GATHER, Op.REDUCE_SCATTER), 1 if sent else 2
            return *(LayerMessage(op=op, token_bytes=carried.hidden, count=count) for op in ops), *sent
        case _:
            return sent


def layer_weight_bytes(work: RankWork) -> int:
    """Bytes of a layer's weights on the ranks of one tensor-parallel rank."""
    return PRECISIONS[work.dtype].weights.num_bytes(work.layer.num_elements(work.tp_size))


def fit_messages(rows: Rows, work: RankWork, *, busy_ranks: int, why: str) -> dict[Op, Curve]:
    """Seconds of each collective that the work needs, by bytes; raises `UserError` when one has no rows.

    Small sums over the group are known where they were measured, otherwise they are left out.
    """
    needed = dict.fromkeys(MESSAGES[work.sp_kind])
    if work.weights is Weights.GATHERED:
        needed[Op.ALL_GATHER] = None
    if work.exchanged is not None:
        needed |= dict.fromkeys((Op.ALL_TO_ALL, Op.ALL_REDUCE) if work.exchanged.beside > 1 else (Op.ALL_TO_ALL,))
    found = {op: _fit(op, message_rows(rows, op, work, busy_ranks=busy_ranks, why=why)) for op in needed}
    if work.sequence_size > 1:
        sums = message_rows(rows, Op.ALL_REDUCE, work, busy_ranks=busy_ranks)
        found |= {Op.ALL_REDUCE: _fit(Op.ALL_REDUCE, sums)} if sums else {}
    return found


def message_rows(
    rows: Rows, op: Op, work: RankWork, *, busy_ranks: int, variant: str = "", why: str = ""
) -> list[Measurement]:
    """Rows of a collective over the ranks that share a round's rows.

    With tensor parallelism these stand tp_size apart: where such groups were not measured, groups of neighbours stand
    for them. why: raise `UserError` that tells it where there are no rows at all.
    """
    size = 2 if op is Op.SEND_RECV else work.sequence_size
    stride = 1 if work.sp_kind is SPKind.MEGATRON or op is Op.SEND_RECV else work.tp_size
    for place in dict.fromkeys((strided(variant, stride), variant)):
        found = rows.select(op, {}, busy_ranks=busy_ranks, group_size=size, variant=place)
        if found:
            return found
    if why:
        return rows.require(op, {}, busy_ranks=busy_ranks, group_size=size, why=f"groups of {size} of {why}")
    return []


def fit_overlap(rows: Rows, work: RankWork, *, busy_ranks: int) -> Overlap:
    """How much messages and products lose to one another: by rows of both side by side, or as usual for the device."""
    messages = message_rows(rows, Op.ALL_GATHER, work, busy_ranks=busy_ranks, variant=BESIDE)
    products = rows.select(Op.MATMUL, {}, busy_ranks=busy_ranks, group_size=work.sequence_size, variant=BESIDE)
    if min(len(messages), len(products)) < _LEAST_ROWS:
        return APART if work.num_multiprocessors is None else ON_A_CARD
    alone = fit_rows(message_rows(rows, Op.ALL_GATHER, work, busy_ranks=busy_ranks, why=work.shape.name), "bytes")
    message = median(expected_s(row) / float(alone(row.shape["bytes"])) for row in messages)
    return Overlap.of_stretches(work=median(_stretches(rows, products, busy_ranks)), message=message)


def _stretches(rows: Rows, products: Sequence[Measurement], busy_ranks: int) -> list[float]:
    """Times of products beside messages over their times alone."""
    found = []
    for row in products:
        sizes: Mapping[str, int] = {"n": row.shape["n"], "k": row.shape["k"]}
        alone = rows.require(Op.MATMUL, sizes, busy_ranks=busy_ranks, group_size=1, why=f"{sizes} alone")
        found.append(expected_s(row) / float(fit_rows(alone, "m")(row.shape["m"])))
    return found


def _fit(op: Op, rows: Sequence[Measurement]) -> Curve:
    if op is not Op.SEND_RECV:
        return fit_rows(rows, "bytes")
    latency_s, byte_s = fit_line([row.shape["bytes"] for row in rows], [expected_s(row) for row in rows])
    return Curve(knots=np.array([0.0, 1.0]), seconds=np.array([latency_s, latency_s + byte_s]))

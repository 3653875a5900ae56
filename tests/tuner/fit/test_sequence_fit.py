"""Fits of layouts with sequence parallelism from rows that tensor-parallel ranks and groups of ranks left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from db.errors import UserError
from db.rows.hardware import Hardware
from db.rows.measurements import Measurement
from profiler.points.point import BESIDE, Op
from profiler.sequence.kind import CUTS, SPKind
from tests.tuner.measured import SHAPE, Machine, measure, relative, with_ranks
from tuner.fit.attention.rows import attention_rows
from tuner.fit.holdout import held_out_errors
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork, Rows
from tuner.fit.sequence.messages import layer_weight_bytes
from tuner.fit.sequence.overlap import APART, COPIED, ON_A_CARD
from tuner.plan.plan import Weights

MACHINE = Machine()
PARTS = ("attention", "layer", "matmul", "elementwise", "head")
TIMES = ("median_us", "p10_us", "p90_us")
ROWS = [
    *measure(MACHINE, sp_size=4),  # over groups of 2 and 4
    *(row for tp_size in (2, 4) for row in measure(MACHINE, tp_size=tp_size) if row.op in PARTS),
]
OWN_RANKS = (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)


def work(**changes: Any) -> RankWork:
    return replace(RankWork(shape=SHAPE, dtype="float32", tp_size=1), **changes)


def fitted(rows: list[Measurement] = ROWS, **changes: object) -> LayerCosts:
    return fit_layer_costs(rows, work(**changes), busy_ranks=2)


@pytest.mark.parametrize("kind", OWN_RANKS)
@pytest.mark.parametrize("size", [2, 4])
def test_token_wise_work_is_that_of_a_share_of_the_rows(kind: SPKind, size: int) -> None:
    costs = fitted(sp_size=size, sp_kind=kind).cut_costs()
    alone = fitted().cut_costs()
    tokens = np.array([4096.0 * size])
    moved = costs.compute_s(tokens) - alone.compute_s(tokens / size)
    assert 0 < moved < 2 * alone.parts.elementwise_s(tokens / size)  # copies of what is sent and received


def test_a_gather_takes_what_was_measured_for_its_bytes() -> None:
    costs = fitted(sp_size=2, sp_kind=SPKind.GATHER)
    rows = 2048  # of each rank; keys and values of the round are 2 x 8 x 64 numbers a token
    bytes_of_round = 2 * rows * 2 * 8 * 64 * 4
    as_hidden_states = bytes_of_round / (2048 * 4)
    found = float(costs.cut_costs().sent_s(np.array([2.0 * rows]))[0])
    assert costs.overlap is APART  # no card is known
    assert relative(found * 1e6, MACHINE.message_us("all_gather", as_hidden_states)) < 1e-6


def test_ulysses_attends_with_the_heads_of_a_larger_tensor_parallel_group() -> None:
    chunks = np.array([64.0, 1024.0, 4096.0])
    ulysses = fitted(sp_size=4, sp_kind=SPKind.ULYSSES)
    tensor = fitted(tp_size=4)
    assert ulysses.cut_costs().base_s(chunks) == pytest.approx(tensor.cut_costs().base_s(chunks), rel=1e-3)
    assert ulysses.cut_costs().slope_s(chunks) == pytest.approx(tensor.cut_costs().slope_s(chunks), rel=1e-3)


def test_heads_that_were_not_measured_take_a_share_of_those_that_were() -> None:
    # 32 heads on 3 ranks: 11 on the one with most; 16 were measured.
    rows = Rows(ROWS)
    found = attention_rows(rows, work(sp_size=3, sp_kind=SPKind.ULYSSES), busy_ranks=2)
    wider = attention_rows(rows, work(tp_size=2), busy_ranks=2)
    assert len(found) == len(wider) > 0
    assert {row.shape["heads"] for row in found} == {16}  # as they were measured: so many filled the card
    assert [one.median_us / other.median_us for one, other in zip(found, wider, strict=True)] == pytest.approx(
        [11 / 16] * len(found)
    )


def test_megatron_needs_no_rows_but_its_collectives() -> None:
    megatron, tensor = fitted(tp_size=4, sp_kind=SPKind.MEGATRON), fitted(tp_size=4)
    tokens = np.array([4096.0])
    sent_us = float(megatron.cut_costs().sent_s(tokens)[0]) * 1e6
    one_of_each = MACHINE.message_us("all_gather", 4096) + MACHINE.message_us("reduce_scatter", 4096)
    assert relative(sent_us, 2 * one_of_each) < 1e-6
    assert megatron.cut_costs().base_s(tokens) == tensor.cut_costs().base_s(tokens)


@pytest.mark.parametrize("kind", OWN_RANKS)
def test_gathered_weights_hide_behind_the_work_of_a_layer(kind: SPKind) -> None:
    whole = fitted(sp_size=2, sp_kind=kind)
    gathered = replace(fitted(sp_size=2, sp_kind=kind, weights=Weights.GATHERED), overlap=ON_A_CARD)
    tokens = np.array([1.0, 512.0, 65_536.0])
    gather_s = float(gathered.messages[Op.ALL_GATHER](layer_weight_bytes(gathered.work)))
    added = gathered.tokens_s(tokens) - replace(whole, overlap=ON_A_CARD).tokens_s(tokens)
    assert (added >= 0).all() and (added <= gather_s).all()
    assert added[-1] == pytest.approx(ON_A_CARD.work_loss * gather_s)
    assert layer_weight_bytes(gathered.work) == SHAPE.layer.num_elements() * 4


@pytest.mark.parametrize(("kind", "op"), [(SPKind.GATHER, "all_gather"), (SPKind.ULYSSES, "all_to_all")])
def test_what_was_not_measured_is_named_with_its_group(kind: SPKind, op: str) -> None:
    rows = [row for row in ROWS if row.op != op]
    with pytest.raises(UserError, match=f"no {op} rows for groups of 2 of .* sp_size 2 {kind}"):
        fitted(rows, sp_size=2, sp_kind=kind)
    with pytest.raises(UserError, match=f"no {op} rows for groups of 8"):
        fitted(ROWS, sp_size=8, sp_kind=kind)


def gathers(variant: str, factor: float) -> list[Measurement]:
    """The gathers of two ranks under another variant, so many times as slow."""
    return [
        replace(
            row, variant=variant, **{name: factor * getattr(row, name) for name in ("median_us", "p10_us", "p90_us")}
        )
        for row in ROWS
        if row.op == Op.ALL_GATHER and row.group_size == 2
    ]


def test_groups_of_ranks_apart_count_beside_tensor_parallelism_where_they_were_measured() -> None:
    asked = {"tp_size": 2, "sp_size": 2, "sp_kind": SPKind.GATHER}
    neighbours, apart = fitted(**asked), fitted([*ROWS, *gathers("stride-2", 3.0)], **asked)
    at = 1 << 20
    assert apart.messages[Op.ALL_GATHER](at) == pytest.approx(3.0 * neighbours.messages[Op.ALL_GATHER](at))
    alone = fitted([*ROWS, *gathers("stride-2", 3.0)], sp_size=2, sp_kind=SPKind.GATHER)
    assert alone.messages[Op.ALL_GATHER](at) == pytest.approx(neighbours.messages[Op.ALL_GATHER](at))


def test_rows_side_by_side_tell_what_each_loses() -> None:
    products = [
        replace(row, variant=BESIDE, group_size=2, median_us=1.25 * row.median_us, p10_us=1.25 * row.p10_us,
                p90_us=1.25 * row.p90_us)
        for row in ROWS
        if row.op == Op.MATMUL and row.shape["n"] == work().projections[0][0] and row.shape["m"] >= 512
    ]  # fmt: skip
    found = fitted([*ROWS, *gathers(BESIDE, 1.1), *products], sp_size=2, sp_kind=SPKind.GATHER).overlap
    assert found.work_loss == pytest.approx(1.1 * (1 - 1 / 1.25))
    assert found.message_loss == pytest.approx(1.25 * (1 - 1 / 1.1))
    assert fitted([*ROWS, *gathers(BESIDE, 1.1)], sp_size=2, sp_kind=SPKind.GATHER).overlap is APART


def test_cards_that_reach_each_others_memory_gather_by_copy_engines() -> None:
    card = Hardware(
        device="NVIDIA H100 80GB HBM3", device_count=4, memory_bytes=80 << 30, driver="1", torch_version="2",
        backend="nccl", num_threads=1, link="nvlink",
    )  # fmt: skip
    for link, gathers_by in (("nvlink", COPIED), ("p2p", COPIED), ("shm", ON_A_CARD)):
        on = RankWork.on(
            replace(card, link=link), shape=SHAPE, dtype="float32", tp_size=1, sp_size=2, sp_kind=SPKind.GATHER
        )
        parts = fit_layer_costs(ROWS, on, busy_ranks=2).cut_costs().parts
        assert (parts.overlap, parts.gather_overlap) == (ON_A_CARD, gathers_by)


def test_a_stage_is_as_slow_as_the_slowest_of_all_its_ranks() -> None:
    rows = with_ranks(ROWS, 0.9, 0.95, 1.0, 0.97)
    costs = fitted(rows, sp_size=2, sp_kind=SPKind.GATHER)
    plain = fitted(ROWS, sp_size=2, sp_kind=SPKind.GATHER)
    shares = [
        one.attention.base(4096) / other.attention.base(4096)
        for one, other in zip(costs.cost_model((8, 8)).stages, plain.cost_model((8, 8)).stages, strict=True)
    ]
    assert shares == pytest.approx([0.95, 1.0])


@pytest.mark.parametrize("kind", [kind for kind in SPKind if kind is not SPKind.NONE])
def test_times_of_every_kind_rise_with_tokens_and_context(kind: SPKind) -> None:
    sizes = {"tp_size": 2} if kind is SPKind.MEGATRON else {"sp_size": 2}
    costs = fitted(sp_kind=kind, **sizes)
    for cut in CUTS[kind]:
        (stage,) = costs.cost_model((16,), cut).stages
        at = np.arange(1, 20_000, 37)
        seconds = stage.tokens_s(at) + stage.chunk_seconds(at, 0)
        assert (np.diff(seconds) >= 0).all()
        assert stage.seconds([(512, 9000, False)]) > stage.seconds([(512, 0, False)])


def test_held_out_errors_name_what_moves_between_ranks() -> None:
    for kind, size, ops in (
        (SPKind.GATHER, {"sp_size": 2}, {"all_gather"}),
        (SPKind.ULYSSES, {"sp_size": 2}, {"all_to_all"}),
        (SPKind.RING, {"sp_size": 2}, set[str]()),
        (SPKind.MEGATRON, {"tp_size": 2}, {"all_gather", "reduce_scatter"}),
        (SPKind.NONE, {"tp_size": 2}, {"all_reduce"}),
    ):
        found = {error.op: error for error in held_out_errors(ROWS, work(sp_kind=kind, **size), busy_ranks=2)}
        assert set(found) == ops | {"matmul", "elementwise", "attention"}
        for op in ops:
            assert found[op].num_points > 0
            assert 0 <= found[op].median < 1e-6  # they lie on a line

"""The search over layouts of a mixture against planning everything: how many ranks its experts are spread over."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import model_from_config
from profiler.model.experts import Dispatch
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from profiler.sequence.kind import SPKind
from tests.tuner.fit.test_expert_costs import CONFIG, measured
from tests.tuner.measured import row
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork, Rows
from tuner.plan.layout import Layout, Pins, enumerate_layouts
from tuner.plan.plan import Request
from tuner.search.layouts import Candidate, search_layouts
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.workload.objective import Objective

RANKS = 4
SHAPE = model_from_config(CONFIG | {"num_key_value_heads": 4, "num_experts": 8}, name="mixture")
NARROW = {128: 1.0, 64: 1.1, 32: 1.5}  # what products of fewer features take for a FLOP
FULLEST = {8: 1.0, 4: 1.1, 2: 1.6}  # what the fullest rank gets over the mean, by the experts that each holds


def priced(point: Point) -> Measurement:
    if point.op is not Op.EXPERTS:
        return measured(point)
    at = point.shape
    mean = at["tokens"] * at["per_token"] * at["held"] / at["experts"]
    us = 20.0 + mean * at["features"] / 10.0 * NARROW[at["features"]] * FULLEST[at["held"]]
    return row(str(point.op), us, dict(at), point.group_size, point.busy_ranks, point.variant)


@cache
def fitted(layout: Layout) -> LayerCosts:
    work = RankWork(
        shape=SHAPE.spread(**layout.spread), dtype="float32", tp_size=layout.tp_size, sp_size=layout.sp_size,
        sp_kind=layout.sp_kind,
    )  # fmt: skip
    return fit_layer_costs(rows(), work, busy_ranks=layout.world_size)


@cache
def rows() -> Rows:
    grid = Grid(
        shape=SHAPE, dtype="float32", tp_sizes=(1, 2, 4), sp_sizes=(2, 4), world_size=RANKS, context_length=4096,
        device_type="cpu",
        kernels=(AttentionKernel.CPU_FOLDED,),
    )  # fmt: skip
    return Rows([priced(point) for point in grid.points() if point.op is not Op.LAYER])


def test_the_search_chooses_how_far_experts_are_spread() -> None:
    requests = tuple(Request(id=f"r{index}", prompt_tokens=tokens) for index, tokens in enumerate((4000, 900)))
    target = Target(shape=SHAPE, dtype="float32", requests=requests, device_type="cpu", memory_bytes=64 << 30)
    rules, layouts = Rules(chunk_multiple=256), enumerate_layouts(SHAPE, RANKS, Pins(sp_size=1, virtual_stages=1))
    assert {layout.ep_size for layout in layouts if layout.tp_size == RANKS} == {1, 2, 4}

    found, everything = (search_layouts(target, layouts, rules, fitted, every=every) for every in (False, True))
    assert (found[0].layout.tp_size, found[0].layout.ep_size) == (RANKS, 2)
    assert found[0].layout == everything[0].layout
    assert found[0].score(Objective.MAKESPAN) == everything[0].score(Objective.MAKESPAN)
    planned = {candidate.layout: candidate for candidate in everything}
    for layout in layouts:  # between both ends it is best in every layout
        if layout.tp_size == RANKS and layout.ep_size == 2 and not layout.refusal:
            ends = [planned[replace(layout, ep_size=size)] for size in (1, RANKS)]
            mine = planned[layout].score(Objective.MAKESPAN)
            assert all(mine < end.score(Objective.MAKESPAN) for end in ends)


def test_rows_are_sent_to_experts_where_each_rank_cannot_hold_all() -> None:
    requests = (Request(id="r0", prompt_tokens=128),)  # short: weights and not rows take the memory
    rules, layouts = Rules(chunk_multiple=64), enumerate_layouts(SHAPE, RANKS, Pins(tp_size=1, pp_size=1, sp_size=4))
    spread = {layout for layout in layouts if layout.dispatch is Dispatch.ALL_TO_ALL}
    assert {str(layout) for layout in layouts if layout.sp_kind is SPKind.GATHER} == {
        "TP1 SP4 gather PP1", "TP1 EP4 all-to-all SP4 gather PP1"
    }  # fmt: skip

    def found(memory_bytes: int, *, every: bool) -> dict[Layout, Candidate]:
        target = Target(
            shape=SHAPE, dtype="float32", requests=requests, device_type="cpu", memory_bytes=memory_bytes
        )  # fmt: skip
        return {one.layout: one for one in search_layouts(target, layouts, rules, fitted, every=every)}

    everything = found(64 << 30, every=True)
    peaks = {layout: candidate.peak_memory_bytes for layout, candidate in everything.items()}
    most = max(peaks[layout] for layout in spread)
    assert most < min(peak for layout, peak in peaks.items() if layout not in spread)
    for every in (False, True):
        best = next(iter(found(int(RANKS * most / 0.92) + 1, every=every).values()))
        assert best.layout in spread
        assert best.refusal is None

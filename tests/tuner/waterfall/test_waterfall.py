"""The way from the peak to the makespan: its steps add up, whatever the plan, the rounds and the machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.errors import UserError
from profiler.model.flops import prefill_flops
from profiler.sequence.kind import SPKind
from service.reasons.waterfall_chart import drawing
from tests.tuner.measured import SHAPE, Machine, measure
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.layout import Layout
from tuner.plan.plan import Plan, Request
from tuner.plan.stage_order import StageOrder
from tuner.rounds.problem import Limits
from tuner.search.layouts import Candidate, search_layouts, to_plan
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.waterfall.kinds import with_kinds
from tuner.waterfall.moves import moves
from tuner.waterfall.steps import DRIFT, PEAK, Kind, check_kinds, flops_of_rounds, to_rows, waterfall

PEAK_FLOPS = 1e11
TARGET = Target(
    shape=SHAPE, dtype="float32", device_type="cuda", memory_bytes=1 << 40,
    requests=(Request(id="a", prompt_tokens=3000), Request(id="b", prompt_tokens=900, cached_tokens=100)),
)  # fmt: skip


def planned(layout: Layout, rules: Rules) -> tuple[Candidate, Plan]:
    """The layout's best candidate on an imaginary machine, and its plan."""
    work = RankWork(
        shape=SHAPE, dtype="float32", tp_size=layout.tp_size, sp_size=layout.sp_size, sp_kind=layout.sp_kind
    )  # fmt: skip
    rows = [row for tp_size in (1, 2) for row in measure(Machine(), tp_size=tp_size, busy_ranks=2)]
    costs = fit_layer_costs(list({row.key: row for row in rows}.values()), work, busy_ranks=layout.world_size)
    (found,) = search_layouts(TARGET, [layout], rules, lambda _: costs)
    return found, with_kinds(to_plan(TARGET, found, rules), found)


LAYOUTS = (
    Layout(tp_size=1, pp_size=1),
    Layout(tp_size=2, pp_size=1),
    Layout(tp_size=1, pp_size=2),
    Layout(tp_size=1, pp_size=2, virtual_stages=2, stage_order=StageOrder.V),
    Layout(tp_size=1, pp_size=1, sp_size=2, sp_kind=SPKind.GATHER),
)
PLANS = [planned(layout, Rules(chunk_multiple=256, window=window)) for layout in LAYOUTS for window in (None, 2)]


@pytest.mark.parametrize(("candidate", "plan"), PLANS)
def test_the_kinds_of_a_round_are_all_of_it(candidate: Candidate, plan: Plan) -> None:
    assert plan.predicted is not None
    assert plan.predicted.round_s is not None
    kinds = plan.predicted.round_kinds
    assert kinds is not None
    assert set(kinds) == set(Kind)
    stage_s = np.array(plan.predicted.round_s).sum(axis=1) / plan.parallel.pp_size
    np.testing.assert_allclose(sum(map(np.array, kinds.values())), stage_s, rtol=1e-9)
    assert (sum(kinds[Kind.COLLECTIVES]) > 0) == (plan.parallel.world_size // plan.parallel.pp_size > 1)
    assert min(map(sum, (kinds[Kind.PRODUCTS], kinds[Kind.ATTENTION], kinds[Kind.ELEMENTWISE]))) > 0
    assert Plan.from_json(plan.to_json()) == plan
    check_kinds(plan)


@given(
    index=st.integers(0, len(PLANS) - 1),
    factors=st.lists(st.floats(0.2, 5.0), min_size=1, max_size=7),
    longer=st.floats(0.9, 2.0),
    slowdown=st.floats(0.7, 1.6),
    has_kinds=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_steps_add_up_to_the_makespan(
    index: int, factors: list[float], longer: float, slowdown: float, has_kinds: bool
) -> None:
    _, plan = PLANS[index]
    assert plan.predicted is not None
    assert plan.predicted.round_s is not None
    if not has_kinds:  # as a hand-written plan
        plan = replace(plan, predicted=replace(plan.predicted, round_kinds=None))
    round_s = np.array(plan.predicted.round_s)
    round_s *= np.resize(factors, round_s.shape)
    makespan_s = longer * plan.predicted.makespan_s
    found = waterfall(plan, SHAPE, round_s, makespan_s, peak_flops=PEAK_FLOPS, slowdown=slowdown)
    assert sum(step.seconds for step in found.steps) == pytest.approx(makespan_s, rel=1e-9)
    flops = prefill_flops(SHAPE, [(c.tokens, c.start) for r in plan.rounds for c in r], len(plan.requests))
    assert sum(values.sum() for values in flops_of_rounds(SHAPE, plan).values()) == pytest.approx(flops)
    assert found.seconds_of(PEAK) == pytest.approx(flops / PEAK_FLOPS / plan.parallel.world_size)
    lost_s = round_s.sum() / plan.parallel.pp_size * (1 - 1 / slowdown)
    assert found.seconds_of(DRIFT) == pytest.approx(lost_s, abs=1e-12)


def test_predicted_and_measured_stand_side_by_side() -> None:
    _, plan = PLANS[4]
    assert plan.predicted is not None
    assert plan.predicted.round_s is not None
    round_s = np.array(plan.predicted.round_s)
    planned = waterfall(plan, SHAPE, round_s, plan.predicted.makespan_s, peak_flops=PEAK_FLOPS)
    slower = waterfall(plan, SHAPE, 1.2 * round_s, 1.3 * plan.predicted.makespan_s, peak_flops=PEAK_FLOPS, slowdown=1.2)
    rows = to_rows(planned, slower)
    assert rows[0][0] == PEAK
    assert rows[0][1] == rows[0][2]
    by_name = {name: seconds for name, *seconds in rows}
    for name in by_name:  # what the machine lost stands apart: the kernels' own losses are as predicted
        if "below peak" in name:
            assert by_name[name][1] == pytest.approx(by_name[name][0])
    picture = drawing(planned, slower, "a plan")
    assert picture.startswith("<svg")
    assert all(name in picture for name in by_name)


def test_moves_are_planned_anew() -> None:
    rules = Rules(chunk_multiple=8, limits=Limits(max_round_tokens=8))
    candidate, plan = planned(Layout(tp_size=1, pp_size=1), rules)
    found = moves(TARGET, candidate, rules)
    assert plan.predicted is not None
    seconds = [move.makespan_s for move in found]
    assert seconds == sorted(seconds)
    assert seconds[-1] < plan.predicted.makespan_s
    assert any(move.change.startswith("longer rounds") for move in found)
    assert any(move.change == "products 10 % quicker" for move in found)


def test_kinds_of_a_damaged_plan_are_refused() -> None:
    _, plan = PLANS[0]
    assert plan.predicted is not None
    assert plan.predicted.round_kinds is not None
    for kinds, message in (
        ({"luck": (1.0,)}, "must be one of"),
        ({"products": (1.0,) * (len(plan.rounds) + 1)}, "one for each of"),
        ({"products": (float("nan"),) * len(plan.rounds)}, "numbers from 0"),
    ):
        with pytest.raises(UserError, match=message):
            check_kinds(replace(plan, predicted=replace(plan.predicted, round_kinds=kinds)))

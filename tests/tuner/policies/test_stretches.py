from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.planner_gap import stage
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, check_rounds
from tuner.policies.exact import exact_rounds
from tuner.policies.fixed import fixed_rounds
from tuner.policies.line.line import TokenLine
from tuner.policies.line.stretches import MOST_PLACES, stretch_rounds
from tuner.policies.sweep import Search, central_cap_s, shortest_first
from tuner.rounds.problem import Limits, Problem
from tuner.search.planner import plan_rounds

MIXED = (900, 5000, 2111, 16000, 7300)
FIRST_SLOWEST = CostModel(stages=tuple(stage(layers=n, table=True) for n in (8.4, 8, 8, 8)), hop_latency_s=1e-5)
PIPELINES = {
    "first slowest": FIRST_SLOWEST,
    "last slowest": replace(FIRST_SLOWEST, stages=FIRST_SLOWEST.stages[::-1]),
    "slow in the middle": CostModel(stages=tuple(stage(layers=n, table=True) for n in (4, 8, 7.9, 4))),
}


def requests(lengths: Sequence[int], cached: int = 0) -> tuple[Request, ...]:
    return tuple(Request(id=f"r{i}", prompt_tokens=n + cached, cached_tokens=cached) for i, n in enumerate(lengths))


@pytest.mark.parametrize("cached", [0, 700])
def test_a_stretch_takes_what_its_round_takes(cached: int) -> None:
    batch, kind = requests(MIXED, cached), stage(layers=8, table=True, head=0.1)
    line = TokenLine(batch, [3, 0, 2, 4, 1], 256)
    seconds, tokens = line.seconds(kind, 40), line.tokens(40)
    for first, end in [(0, 1), (0, 40), (61, 63), (61, 64), (62, 72), (60, 90), (len(line) - 3, len(line))]:
        chunks = line.round(first, end)
        expected_s = kind.seconds([(c.tokens, c.start, c.end == batch[c.request].prompt_tokens) for c in chunks])
        assert seconds[first, end - first - 1] == pytest.approx(expected_s)
        assert tokens[first, end - first - 1] == sum(chunk.tokens for chunk in chunks)


@pytest.mark.parametrize("cached", [0, 700])
@pytest.mark.parametrize("most", [None, 1024])
@pytest.mark.parametrize("name", PIPELINES)
def test_candidates_run_every_token_once_in_rounds_within_the_limits(name: str, most: int | None, cached: int) -> None:
    batch, limits = requests(MIXED, cached), Limits(max_round_tokens=most)
    problem = Problem(cost=PIPELINES[name], requests=batch, chunk_multiple=256, limits=limits)
    plans = list(stretch_rounds(problem, shortest_first(problem), central_cap_s(problem)))
    assert plans
    for rounds in plans:
        check_rounds(batch, rounds)
        for chunks in rounds:
            assert most is None or sum(chunk.tokens for chunk in chunks) <= most
            for chunk in chunks:
                assert chunk.tokens % 256 == 0 or chunk.end == batch[chunk.request].prompt_tokens


@pytest.mark.parametrize("name", PIPELINES)
def test_one_prompt_is_cut_about_as_well_as_by_exhaustive_search(name: str) -> None:
    problem = Problem(cost=PIPELINES[name], requests=requests([12000]), chunk_multiple=256)
    best_s = problem.evaluate(exact_rounds(problem, fixed_rounds(problem, 1024))[0]).makespan_s
    plans = stretch_rounds(problem, [0], central_cap_s(problem))
    assert min(problem.evaluate(rounds).makespan_s for rounds in plans) <= 1.015 * best_s


def test_rounds_shrink_towards_the_end_where_the_first_stage_is_slowest() -> None:
    problem = Problem(cost=FIRST_SLOWEST, requests=requests([3000] * 40), chunk_multiple=256)
    rounds = next(stretch_rounds(problem, shortest_first(problem), central_cap_s(problem)))
    seconds = problem.evaluate(rounds).round_s[:, 0]
    quarters = [each.mean() for each in np.array_split(seconds, 4)]
    assert all(before > after for before, after in pairwise(quarters))


@pytest.mark.parametrize("name", ["first slowest", "last slowest"])
def test_batches_on_uneven_tables_gain(name: str) -> None:
    cost, batch = PIPELINES[name], requests([1500, 40000, 9000, 3000, 22000, 700])
    with patch.object(Search, "sweep_by_worth"):
        found = plan_rounds(cost, batch, chunk_multiple=256)
        with patch("tuner.policies.joint.stretch_rounds", lambda *_: iter(())):
            without = plan_rounds(cost, batch, chunk_multiple=256)
    assert found.makespan_s < 0.995 * without.makespan_s


def test_long_lines_are_cut_coarsely_or_not_at_all() -> None:
    problem = Problem(cost=FIRST_SLOWEST, requests=requests([2 * MOST_PLACES * 64]))
    rounds = next(stretch_rounds(problem, [0], central_cap_s(problem)))
    assert {chunk.tokens % 128 for chunks in rounds for chunk in chunks} == {0}
    many = Problem(cost=FIRST_SLOWEST, requests=requests([1000] * 2 * MOST_PLACES))
    assert not list(stretch_rounds(many, shortest_first(many), 0.01))

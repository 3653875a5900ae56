"""What an explanation says is about the objective that was planned for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.tuner.search.test_layouts import SMALL, Fits, prompts, target_of
from tuner.plan.layout import enumerate_layouts
from tuner.plan.plan import Request
from tuner.policies.fixed import fixed_rounds
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import FlatRounds, RoundTimes
from tuner.search.explanation import CUTS_TRIED, Arena, explain
from tuner.search.layouts import Candidate, search_layouts
from tuner.search.partition import even_partition
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.workload.objective import Objective

REQUESTS = tuple(
    replace(request, sla_ttft_s=seconds)
    for request, seconds in zip(prompts(3000, 900, 300), (0.2, 0.06, 0.9), strict=True)
)


def searched(objective: Objective, requests: tuple[Request, ...] = REQUESTS) -> tuple[Target, list[Candidate], Rules]:
    target, rules = target_of(SMALL, requests), Rules(chunk_multiple=256, objective=objective)
    fits = Fits(SMALL, "quick", 4)
    return target, search_layouts(target, enumerate_layouts(SMALL, 4), rules, fits), rules


@pytest.mark.parametrize("objective", Objective)
def test_who_wins_elsewhere_is_told_by_what_is_sought(objective: Objective) -> None:
    """Against all equal chunks of all contenders, each judged by the whole recurrence."""
    target, candidates, rules = searched(objective)
    arena = Arena(target, candidates, rules)
    places = {
        Objective.MEAN_TTFT: lambda one: one.new_tokens,
        Objective.P99_TTFT: lambda one: one.new_tokens,
        Objective.SLA: lambda one: one.sla_ttft_s,
        Objective.LATENESS: lambda one: one.sla_ttft_s,
    }
    requests = tuple(sorted(REQUESTS, key=places.get(objective, lambda one: 0)))
    for factor in (1 / 64, 1.0):
        best = min(
            score
            for candidate in arena.contenders
            for cuts in CUTS_TRIED
            for score in [_score(candidate, requests, factor, -(-4200 // (cuts * 256)), objective)]
        )
        winner = arena.winner(REQUESTS, factor)
        assert winner.sought == (-best[0] if objective is Objective.SLA else best[0])


def _score(
    candidate: Candidate, requests: tuple[Request, ...], factor: float, units: int, objective: Objective
) -> tuple[float, ...]:
    partition = even_partition(SMALL.num_layers, candidate.layout.num_groups)
    cost = candidate.layout_costs.with_links(factor).cost_model(partition)
    problem = Problem(cost=cost, requests=requests, chunk_multiple=256)
    rounds = fixed_rounds(problem, 256 * max(units, 1))
    judged = problem.evaluate(rounds).score(objective)
    least = RoundTimes.of(cost, requests, FlatRounds.of(rounds)).least_score(cost, requests, objective)
    assert least[0] <= judged[0] + 1e-9
    return judged


@pytest.mark.parametrize("objective", [Objective.MAKESPAN, Objective.MEAN_TTFT, Objective.P99_TTFT])
def test_parts_add_up_to_what_is_sought(objective: Objective) -> None:
    target, candidates, rules = searched(objective)
    why = explain(target, candidates, rules)
    assert why.objective is why.parts_of is objective
    for family, parts in zip(why.families, why.parts, strict=True):
        assert family.rounds is not None
        assert parts.total_s == pytest.approx(family.rounds.evaluation.sought(objective))
        assert min(parts.compute_s, parts.attention_s, parts.bubble_s) > -1e-9


@pytest.mark.parametrize("objective", [Objective.SLA, Objective.LATENESS])
def test_parts_of_a_makespan_are_not_said_to_be_those_of_deadlines(objective: Objective) -> None:
    target, candidates, rules = searched(objective)
    why = explain(target, candidates, rules)
    assert why.parts_of is Objective.MAKESPAN is not why.objective
    assert why.families[0].rounds is not None
    assert why.parts[0].total_s == pytest.approx(why.families[0].rounds.makespan_s)


def test_of_requests_that_arrive_over_time_only_the_makespan_has_parts() -> None:
    target, candidates, rules = searched(
        Objective.MEAN_TTFT, tuple(replace(one, arrival_s=0.01 * i) for i, one in enumerate(REQUESTS))
    )
    why = explain(target, candidates, rules)
    assert why.parts_of is Objective.MAKESPAN
    assert not why.by_link and not why.by_length and not why.by_batch

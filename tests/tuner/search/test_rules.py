"""Rules know the traces that they were asked about: a policy is not replayed twice."""

from __future__ import annotations

from dataclasses import replace

from tests.tuner.atom import atom
from tests.tuner.online.arrivals import stream
from tuner.rounds.problem import Limits
from tuner.search.rules import Rules
from tuner.workload.objective import Objective


def test_what_planned_a_trace_is_not_replayed_again_beside_its_rivals() -> None:
    rules, requests = Rules(objective=Objective.MEAN_TTFT), stream(4096, 0.5, 12)
    planned = rules.plan(atom(2), requests)
    assert rules.replays(atom(2), requests, everything=False)[-1].planned is planned  # by a cost model that is equal
    assert replace(rules, num_trials=0).plan(atom(2), requests) is planned
    anew = replace(rules, known={}).plan(atom(2), requests)
    assert anew is not planned and anew.rounds == planned.rounds


def test_other_rules_and_other_pipelines_are_replayed_on_their_own() -> None:
    rules, requests = Rules(objective=Objective.MEAN_TTFT), stream(4096, 0.5, 12)
    planned = rules.plan(atom(2), requests)
    limited = replace(rules, limits=Limits(max_round_tokens=1024)).plan(atom(2), requests)
    assert max(sum(chunk.tokens for chunk in chunks) for chunks in limited.rounds) <= 1024
    assert rules.plan(atom(4), requests).makespan_s != planned.makespan_s

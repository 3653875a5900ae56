"""The rounds of a plan given step by step, as vLLM's scheduler asks for them.

The scheduler class itself runs on vLLM's own code in `benchmarks/engine_rounds.py`: vLLM is no dependency of the tests.
"""

from __future__ import annotations

import pytest

from service.engines.plan_steps import PlanSteps
from tuner.plan.plan import Chunk, Parallel, Plan, Request


@pytest.fixture
def plan() -> Plan:
    chunks = [
        [Chunk(request=0, start=0, tokens=60), Chunk(request=1, start=16, tokens=40)],
        [Chunk(request=0, start=60, tokens=50)],
        [Chunk(request=1, start=56, tokens=44)],
    ]
    return Plan(
        model={},
        precision="bfloat16",
        parallel=Parallel(tp_size=1, pp_size=2, layer_partition=(1, 1)),
        window=None,
        requests=(Request(id="a", prompt_tokens=110), Request(id="b", prompt_tokens=100, cached_tokens=16)),
        rounds=tuple(tuple(one) for one in chunks),
    )


def run(steps: PlanSteps, positions: dict[str, int], lengths: dict[str, int]) -> list[dict[str, int]]:
    """What each step runs until all prompts are through."""
    ran: list[dict[str, int]] = []
    while any(positions[name] < lengths[name] for name in positions):
        steps.begin(positions)
        names = sorted((name for name in positions if positions[name] < lengths[name]), key=steps.order)
        step = {name: steps.allowed(name, positions[name], lengths[name]) for name in names}
        step = {name: tokens for name, tokens in step.items() if tokens}
        assert step, "a step must run something"
        ran.append(step)
        for name, tokens in step.items():
            positions[name] += tokens
    return ran


def test_steps_are_the_rounds_of_the_plan_again_and_again(plan: Plan) -> None:
    steps = PlanSteps(plan)
    assert steps.most_tokens == 100
    for turn in range(2):
        lengths = {f"cmpl-b-{turn}": 100, f"cmpl-a-{turn}": 110}
        for name, length in lengths.items():
            steps.come(name, length)
        a, b = f"cmpl-a-{turn}", f"cmpl-b-{turn}"
        assert run(steps, {b: 16, a: 0}, lengths) == [{a: 60, b: 40}, {a: 50}, {b: 44}]
        assert steps.begin({}) is None


def test_who_comes_late_or_is_sent_back_catches_up_first(plan: Plan) -> None:
    steps = PlanSteps(plan)
    steps.come("a", 110)
    assert run(steps, {"a": 0}, {"a": 110}) == [{"a": 60}, {"a": 50}]
    steps.come("b", 100)
    # Less of it was cached than planned: its first chunk begins earlier and ends where it should.
    assert run(steps, {"a": 110, "b": 0}, {"a": 110, "b": 100}) == [{"b": 56}, {"b": 44}]
    assert steps.begin({"a": 0, "b": 56}) == 0
    assert steps.allowed("b", 56, 100) == 0


def test_requests_that_the_plan_does_not_know_wait_and_then_take_its_chunk_sizes(plan: Plan) -> None:
    steps = PlanSteps(plan)
    lengths = {"other": 150, "another": 20, "a": 110}
    for name, length in lengths.items():
        steps.come(name, length)
    ran = run(steps, dict.fromkeys(lengths, 0), lengths)
    assert ran[:2] == [{"a": 60}, {"a": 50}]
    assert all(sum(step.values()) <= 60 for step in ran)
    assert sum(step.get("other", 0) for step in ran) == 150

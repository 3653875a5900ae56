import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db.errors import UserError
from tests.tuner.atom import ATOM, atom
from tests.tuner.search.test_planner import prompts
from tests.tuner.strategies import batches, cost_models, windows
from tuner.online.driven import online_rounds
from tuner.online.online_planner import OnlinePlanner
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, check_rounds
from tuner.plan.stage_cost import PairAttention, StageCost
from tuner.rounds.problem import Limits, Problem
from tuner.search.planner import plan_rounds
from tuner.workload.objective import Objective

BATCHES = {
    "one long prompt": (131072,),
    "the mix": tuple(ATOM["request_mix"]),
    "alike": (32768,) * 12,
    "short": tuple(range(600, 6000, 150)),
}


@pytest.mark.parametrize("objective", [Objective.MAKESPAN, Objective.MEAN_TTFT])
@pytest.mark.parametrize("pp_size", [2, 8])
@pytest.mark.parametrize("name", BATCHES)
def test_with_all_known_at_the_start_it_plans_as_well_as_the_batch_planner(
    name: str, pp_size: int, objective: Objective
) -> None:
    _check_against_batch(BATCHES[name], pp_size, pp_size + 1, objective)


@pytest.mark.parametrize(
    ("objective", "seed"),
    [*((Objective.MAKESPAN, seed) for seed in range(24)), *((Objective.MEAN_TTFT, seed) for seed in range(8))],
)
def test_random_mixes_are_planned_as_well_as_by_the_batch_planner(objective: Objective, seed: int) -> None:
    rng = random.Random(1000 + seed)
    num_requests, pp_size = rng.choice([1, 2, 3, 5, 9, 16, 28, 40]), rng.choice([2, 3, 4, 8])
    lengths = [int(1024 * 2 ** (7 * rng.random())) for _ in range(num_requests)]
    _check_against_batch(lengths, pp_size, rng.choice([None, pp_size + 1]), objective)


def _check_against_batch(lengths: Sequence[int], pp_size: int, window: int | None, objective: Objective) -> None:
    """The makespan is within 2 % of the batch planner's; the mean TTFT within 3 % where that is the objective."""
    requests = tuple(prompts(*lengths))
    problem = Problem(cost=atom(pp_size), requests=requests, window=window, objective=objective)
    batch = plan_rounds(problem.cost, requests, window=window, objective=objective).evaluation
    online = problem.evaluate(online_rounds(problem))
    assert online.makespan_s <= 1.02 * batch.makespan_s
    if objective is Objective.MEAN_TTFT:
        assert online.mean_ttft_s <= 1.03 * batch.mean_ttft_s


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cost=cost_models(max_stages=4),
    requests=batches(),
    window=windows,
    objective=st.sampled_from(list(Objective)),
    round_limit=st.sampled_from([None, 512]),
    kv_share=st.sampled_from([None, 1.0]),
)
def test_rounds_given_one_by_one_keep_the_contract(
    cost: CostModel,
    requests: list[Request],
    window: int | None,
    objective: Objective,
    round_limit: int | None,
    kv_share: float | None,
) -> None:
    longest = max(request.prompt_tokens for request in requests)
    limits = Limits(max_round_tokens=round_limit, max_kv_tokens=None if kv_share is None else longest)
    problem = Problem(
        cost=cost,
        requests=tuple(requests),
        window=window,
        chunk_multiple=128,
        limits=limits,
        objective=objective,
    )
    rounds = online_rounds(problem)
    check_rounds(requests, rounds)
    if round_limit is not None:
        assert all(sum(chunk.tokens for chunk in chunks) <= round_limit for chunks in rounds)
    if kv_share is not None:  # only one of the longest prompts is in progress at a time
        for i in range(len(rounds)):
            held = sum(
                r.prompt_tokens
                for j, r in enumerate(requests)
                if any(c.request == j for chunks in rounds[: i + 1] for c in chunks)
                and any(c.request == j for chunks in rounds[i:] for c in chunks)
            )
            assert held <= longest


def test_the_window_closes_and_opens() -> None:
    planner = OnlinePlanner(atom(4), window=2)
    assert planner.next_round(0.0) is None
    planner.add(Request(id="a", prompt_tokens=131072))
    first, second, third = (planner.next_round(0.0) for _ in range(3))
    assert first and second
    assert third is None
    planner.finish_round(2.5)
    assert planner.next_round(2.5)


def test_an_aborted_request_is_never_seen_again() -> None:
    planner = OnlinePlanner(atom(4), limits=Limits(max_kv_tokens=131072))
    planner.add(Request(id="a", prompt_tokens=131072))
    planner.add(Request(id="b", prompt_tokens=120000))
    first = planner.next_round(0.0)
    assert first is not None
    started = first[0].request
    assert planner.abort(planner.requests[started].id)
    assert not planner.abort(planner.requests[started].id)
    assert not planner.abort("never heard of")
    other = 1 - started
    seen = set()
    while planner.num_waiting:
        chunks = planner.next_round(0.0)
        assert chunks is not None  # the aborted request's KV room is free again
        seen |= {chunk.request for chunk in chunks}
    assert seen == {other}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    planner = OnlinePlanner(atom(4))
    planner.add(Request(id="long", prompt_tokens=131072))
    planner.next_round(0.0)
    planner.add(Request(id="short", prompt_tokens=1000, arrival_s=0.1), 0.1)
    chunks = planner.next_round(0.3)
    assert chunks is not None
    assert [chunk.request for chunk in chunks] == [1, 0]
    assert chunks[0].tokens == 1000


def test_a_long_prompt_does_not_starve() -> None:
    """Short prompts arrive faster than they can run; the long one ends all the same."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 1.0), round_overhead_s=0.05)
    planner = OnlinePlanner(CostModel(stages=(stage, stage)))
    planner.add(Request(id="long", prompt_tokens=20_000))
    now, done = 0.0, 0
    for i in range(6000):
        planner.add(Request(id=f"s{i}", prompt_tokens=1000, arrival_s=now), now)
        for chunk in planner.next_round(now) or ():
            done += chunk.tokens if chunk.request == 0 else 0
        now += 1.0
        if done == 20_000:
            break
    assert done == 20_000


def test_sla_runs_the_nearest_deadline_first() -> None:
    planner = OnlinePlanner(atom(2), objective=Objective.SLA)
    planner.add(Request(id="later", prompt_tokens=1000, sla_ttft_s=9.0))
    planner.add(Request(id="never", prompt_tokens=10))
    planner.add(Request(id="sooner", prompt_tokens=4000, sla_ttft_s=2.0))
    chunks = planner.next_round(0.0)
    assert chunks is not None
    assert chunks[0].request == 2


def test_prompts_longer_than_the_tables_are_planned() -> None:
    planner = OnlinePlanner(atom(4))
    planner.add(Request(id="a", prompt_tokens=1_000_000))
    total = 0
    while planner.num_waiting:
        total += sum(chunk.tokens for chunk in planner.next_round(0.0) or ())
    assert total == 1_000_000


def test_overhead_that_no_cap_holds_still_moves_on() -> None:
    stage = StageCost(
        token_count=(0, 1),
        token_seconds=(0.0, 0.0),
        attention=PairAttention(context_token_s=1.0),
        round_overhead_s=1e-6,
    )
    planner = OnlinePlanner(CostModel(stages=(stage,) * 3), chunk_multiple=10)
    planner.add(Request(id="a", prompt_tokens=50, cached_tokens=15))
    total = 0
    while planner.num_waiting:
        total += sum(chunk.tokens for chunk in planner.next_round(0.0) or ())
    assert total == 35


def test_bad_calls_are_refused() -> None:
    with pytest.raises(UserError, match="window: 0"):
        OnlinePlanner(atom(2), window=0)
    with pytest.raises(UserError, match="max_round_tokens: 10"):
        OnlinePlanner(atom(2), limits=Limits(max_round_tokens=10))
    with pytest.raises(UserError, match="objective: best"):
        OnlinePlanner(atom(2), objective="best")  # type: ignore[arg-type]  # wrong on purpose
    planner = OnlinePlanner(atom(2), limits=Limits(max_kv_tokens=100))
    planner.add(Request(id="a", prompt_tokens=100))
    with pytest.raises(UserError, match="id: a; each waiting request"):
        planner.add(Request(id="a", prompt_tokens=100))
    with pytest.raises(UserError, match="prompt_tokens: 101; at most 100"):
        planner.add(Request(id="b", prompt_tokens=101))
    with pytest.raises(UserError, match="no round is in flight"):
        planner.finish_round()

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from db.errors import UserError
from tests.tuner.atom import ATOM, atom
from tests.tuner.oracle import best_makespan_s, random_instance
from tests.tuner.strategies import batches, cost_models, windows
from tuner.fit.attention.curve import Waves
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, check_rounds
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.policies.exact import exact_rounds
from tuner.policies.fixed import fixed_rounds
from tuner.policies.joint import NEAR_BOUND
from tuner.policies.named import BASED, Floor, base_sizes, named_rounds
from tuner.rounds.problem import Limits, Problem, RoundOptions
from tuner.rounds.round_plan import best_first
from tuner.search.planner import POLICIES, best_fixed, compare_policies, draft_plan, fixed_sweep, plan_rounds
from tuner.workload.objective import Objective

NAMED = ["fixed:256", *POLICIES[1:]]


def prompts(*lengths: int) -> list[Request]:
    return [Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(lengths)]


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    cost=cost_models(max_stages=4),
    requests=batches(max_requests=4),
    window=windows,
    objective=st.sampled_from(list(Objective)),
    round_limit=st.sampled_from([None, 512, 4096]),
    kv_share=st.sampled_from([None, 1.0, 1.5]),
)
@pytest.mark.parametrize("policy", NAMED)
def test_every_policy_keeps_the_contract(
    policy: str,
    cost: CostModel,
    requests: list[Request],
    window: int | None,
    objective: Objective,
    round_limit: int | None,
    kv_share: float | None,
) -> None:
    """Every token once and in order, no round over its limits, the bound below, and time as the recurrence has it."""
    longest = max(request.prompt_tokens for request in requests)
    kv_limit = None if kv_share is None else int(longest * kv_share)
    limits = Limits(max_round_tokens=round_limit, max_kv_tokens=kv_limit)
    plan = plan_rounds(
        cost, requests, policy=policy, window=window, chunk_multiple=256, limits=limits, objective=objective
    )
    check_rounds(requests, plan.rounds)
    for chunks in plan.rounds:
        for chunk in chunks:
            ends = chunk.end == requests[chunk.request].prompt_tokens
            assert ends or chunk.tokens % 256 == 0
        if round_limit is not None:
            assert sum(chunk.tokens for chunk in chunks) <= round_limit
    if kv_limit is not None:
        first = {c.request: i for i, chunks in reversed(list(enumerate(plan.rounds))) for c in chunks}
        last = {c.request: i for i, chunks in enumerate(plan.rounds) for c in chunks}
        for i in range(len(plan.rounds)):
            held = sum(r.prompt_tokens for j, r in enumerate(requests) if first[j] <= i <= last[j])
            assert held <= kv_limit
    assert plan.lower_bound_s <= plan.makespan_s * (1 + 1e-9)
    assert plan.gap >= -1e-9
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=256)
    assert problem.evaluate(plan.rounds).makespan_s == plan.makespan_s
    start_s = plan.evaluation.timeline.start_s[:, 0]
    for begins, chunks in zip(start_s, plan.rounds, strict=True):
        assert begins >= max(requests[chunk.request].arrival_s for chunk in chunks) - 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_small_batches_are_planned_as_well_as_by_exhaustive_search(seed: int) -> None:
    instance = random_instance(seed)
    best_s = best_makespan_s(instance)
    plan = plan_rounds(instance.cost, instance.requests, window=instance.window, chunk_multiple=instance.chunk_multiple)
    assert best_s * (1 - 1e-6) <= plan.lower_bound_s <= best_s * (1 + 1e-9)  # an exact search is its own proof
    assert best_s * (1 - 1e-9) <= plan.makespan_s <= best_s * (1 + 1e-6)
    relaxed_s = plan_rounds(
        instance.cost, instance.requests, policy="gpipe", window=instance.window, chunk_multiple=instance.chunk_multiple
    ).lower_bound_s
    assert relaxed_s <= best_s * (1 + 1e-9)


def test_a_search_that_leaves_labels_out_proves_nothing() -> None:
    instance = next(one for one in map(random_instance, range(100)) if len(one.cost.kinds) > 2)
    problem = Problem(
        cost=instance.cost, requests=instance.requests, window=instance.window, chunk_multiple=instance.chunk_multiple
    )
    known = fixed_rounds(problem, 4 * instance.chunk_multiple)
    proven = [exact_rounds(problem, known, most_labels)[1] for most_labels in (1, 256)]
    assert proven == [False, True]


@pytest.mark.parametrize("seed", range(100, 106))
def test_the_oracle_loses_nothing_by_leaving_dominated_plans_out(seed: int) -> None:
    instance = random_instance(seed, most_units=6)
    assert best_makespan_s(instance) == pytest.approx(best_makespan_s(instance, prune=False), rel=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 500), factor=st.sampled_from([1e-3, 0.25, 8.0, 1e3]))
def test_scaling_all_costs_scales_the_plan(seed: int, factor: float) -> None:
    instance = random_instance(seed, most_units=8)
    plans = [
        plan_rounds(cost, instance.requests, window=instance.window, chunk_multiple=instance.chunk_multiple)
        for cost in (instance.cost, instance.cost.scaled(factor))
    ]
    assert plans[1].makespan_s == pytest.approx(plans[0].makespan_s * factor, rel=1e-6)
    assert plans[1].lower_bound_s == pytest.approx(plans[0].lower_bound_s * factor, rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 500), more=st.integers(1, 3))
def test_more_work_never_ends_sooner(seed: int, more: int) -> None:
    """Small batches are planned exactly, so the best makespan may not fall when a prompt grows."""
    instance = random_instance(seed, most_units=7)
    grown = list(instance.requests)
    grown[0] = Request(
        id="r0",
        prompt_tokens=grown[0].prompt_tokens + more * instance.chunk_multiple,
        cached_tokens=grown[0].cached_tokens,
    )
    before, after = (
        plan_rounds(instance.cost, batch, window=instance.window, chunk_multiple=instance.chunk_multiple)
        for batch in (instance.requests, grown)
    )
    assert after.makespan_s >= before.makespan_s * (1 - 1e-6)


@pytest.mark.parametrize(
    ("lengths", "pp_size", "window", "record_s"),
    [
        ((131072,), 4, None, 9.28),
        (tuple(ATOM["request_mix"]), 4, 5, 22.6),
        (tuple(ATOM["request_mix"]), 8, 9, 25.15),
    ],
)
def test_the_field_s_records_are_beaten(
    lengths: tuple[int, ...], pp_size: int, window: int | None, record_s: float
) -> None:
    plan = plan_rounds(atom(pp_size), prompts(*lengths), window=window)
    assert plan.makespan_s <= record_s
    assert plan.gap <= 0.01


def test_mean_ttft_is_traded_for_at_most_two_percent_of_makespan() -> None:
    requests = prompts(*ATOM["request_mix"])
    fastest = plan_rounds(atom(4), requests, window=5)
    plan = plan_rounds(atom(4), requests, window=5, objective=Objective.MEAN_TTFT)
    assert plan.evaluation.mean_ttft_s <= 4.4
    assert plan.makespan_s <= 1.02 * fastest.makespan_s
    assert plan.gap <= 0.021


@pytest.mark.parametrize("objective", [Objective.MEAN_TTFT, Objective.P99_TTFT, Objective.LATENESS, Objective.SLA])
@pytest.mark.parametrize("policy", ["joint", "dp"])
@pytest.mark.parametrize("seed", range(6))
def test_the_limit_of_the_makespan_is_kept(seed: int, policy: str, objective: Objective) -> None:
    """Beside what the same policy makes of the makespan alone; a looser limit costs no mean TTFT."""
    instance = random_instance(seed + 40)
    requests = tuple(replace(each, arrival_s=0.0, sla_ttft_s=0.5 + i) for i, each in enumerate(instance.requests))
    options: RoundOptions = {"window": instance.window, "chunk_multiple": instance.chunk_multiple}
    least_s = plan_rounds(instance.cost, requests, policy=policy, **options).makespan_s
    for most in (0.0, 0.01, 0.2):
        plan = plan_rounds(
            instance.cost, requests, policy=policy, objective=objective, max_makespan_increase=most, **options
        )
        assert plan.makespan_s <= (1.0 + most) * least_s * (1 + 1e-9)


def test_more_makespan_given_up_brings_a_smaller_mean_ttft() -> None:
    """On one stage, where rounds as large as memory allows end all prompts at once."""
    stage = StageCost(token_count=(0, 65536), token_seconds=(0.0, 1.0), round_overhead_s=0.02)
    requests, found = prompts(*[8192] * 6), []
    for most in (0.0, 0.02, 0.05, math.inf):
        options: RoundOptions = {"objective": Objective.MEAN_TTFT, "max_makespan_increase": most}
        found.append(plan_rounds(CostModel(stages=(stage,)), requests, **options).evaluation)
    means = [each.mean_ttft_s for each in found]
    assert means == sorted(means, reverse=True) and means[-1] < 0.8 * means[0]
    spans = [each.makespan_s for each in found]
    assert spans == sorted(spans) and spans[1] <= 1.02 * spans[0] and spans[2] <= 1.05 * spans[0]


def test_a_quicker_policy_does_not_take_the_place_of_a_smaller_mean_ttft() -> None:
    ours = plan_rounds(atom(4), prompts(65536, 2048, 2048), objective=Objective.MEAN_TTFT)
    ends_s = replace(ours.evaluation, makespan_s=0.98 * ours.makespan_s, mean_ttft_s=ours.makespan_s)
    quicker = replace(ours, policy="fixed:4096", evaluation=ends_s)
    assert best_first([quicker, ours], Objective.MEAN_TTFT, ours=ours) == [ours, quicker]
    assert best_first([ours, quicker], Objective.MAKESPAN, ours=ours) == [quicker, ours]


def test_the_model_agrees_with_the_engine_that_was_measured() -> None:
    """ATOM's five measured fixed rows, within 0.5 % as their coefficients were fitted."""
    for chunk, measured_ms in ATOM["measured_ttft_ms_by_fixed_chunk"].items():
        plan = plan_rounds(atom(4), prompts(131072), policy=f"fixed:{chunk}")
        assert plan.makespan_s * 1e3 == pytest.approx(measured_ms, rel=0.005)


def test_deadlines_are_met_where_they_can_be() -> None:
    stage = StageCost(token_count=(0, 1024), token_seconds=(0.0, 1.0))
    requests = [
        Request(id="hopeless", prompt_tokens=8192, sla_ttft_s=2.0),
        Request(id="late", prompt_tokens=2048, sla_ttft_s=5.0),
        Request(id="soon", prompt_tokens=1024, sla_ttft_s=1.5),
    ]
    plan = plan_rounds(CostModel(stages=(stage,)), requests, objective=Objective.SLA)
    assert plan.evaluation.num_sla_met == 2


def test_stairs_are_not_started_for_a_few_tokens() -> None:
    """A kernel that works in tiles of 512 tokens: chunks end on tiles although the grid is finer."""
    points = [n for i in range(16) for n in (i * 512 + 1, (i + 1) * 512)]
    steps = [(i + 1) * 0.05 for i in range(16) for _ in range(2)]
    cost = CostModel(stages=(StageCost(token_count=tuple(points), token_seconds=tuple(steps)),)).for_pp_size(3)
    plan = plan_rounds(cost, prompts(8192), chunk_multiple=128)
    assert all(sum(chunk.tokens for chunk in chunks) % 512 == 0 for chunks in plan.rounds)


@pytest.mark.parametrize("lengths", [(131072,), (20000, 10000, 5000)])
def test_chunks_fill_a_card_that_works_in_steps(lengths: tuple[int, ...]) -> None:
    sizes = range(256, 131072 + 1, 256)
    waves = Waves(num_heads=32, num_multiprocessors=132)
    attention = TableAttention(
        count=tuple(sizes),
        base_s=tuple(1e-10 * size**2 for size in sizes),
        context_s=tuple(np.maximum.accumulate([3e-10 * size * float(waves(size)) for size in sizes]).tolist()),
    )
    stage = StageCost(token_count=(0, 131072), token_seconds=(0.0, 3.2), attention=attention, round_overhead_s=3e-4)
    cost = CostModel(stages=(stage, stage))
    requests = prompts(*lengths)
    ours, *fixed = (
        plan_rounds(cost, requests, policy=policy, chunk_multiple=256)
        for policy in ("joint", "fixed:512", "fixed:1024", "fixed:2048", "fixed:4096")
    )
    assert ours.makespan_s <= min(plan.makespan_s for plan in fixed)
    rounds = [sum(chunk.tokens for chunk in chunks) for chunks in ours.rounds if len(chunks) == 1]
    full = sum(size % 512 == 0 for size in rounds[len(rounds) // 2 :])  # late rounds, whose context is long
    assert full >= 0.8 * (len(rounds) - len(rounds) // 2)


@pytest.mark.parametrize(("lengths", "most"), [((32768, 30000), 1500), ((131072,) * 3, 2048)])
def test_few_long_prompts_on_uneven_stages_keep_a_short_round(lengths: tuple[int, ...], most: int) -> None:
    stages = tuple(
        StageCost(token_count=(0, 4096), token_seconds=(0.0, s), round_overhead_s=1e-3) for s in (0.10, 0.11)
    )
    plan = plan_rounds(
        CostModel(stages=stages), prompts(*lengths), chunk_multiple=64, limits=Limits(max_round_tokens=most)
    )
    assert max(sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds) <= most


def test_fixed_chunks_compete_from_far_away() -> None:
    # Each chunk pays for a whole wave of 4096 tokens: far fewer rounds are better than where the caps are swept.
    sizes = (64, 4096, 8192, 12288)
    attention = TableAttention(count=sizes, base_s=(1e-4,) * 4, context_s=(4e-7, 4e-7, 8e-7, 12e-7))
    stage = StageCost(token_count=(0, 131072), token_seconds=(0.0, 0.01), attention=attention)
    cost = CostModel(stages=(stage,) * 4)
    ours = plan_rounds(cost, prompts(65536), chunk_multiple=64).makespan_s
    for size in (1024, 2048, 4096, 8192):
        assert ours <= plan_rounds(cost, prompts(65536), policy=f"fixed:{size}", chunk_multiple=64).makespan_s


def test_comparing_lists_every_policy_and_ours_first() -> None:
    plans = compare_policies(atom(4), prompts(*ATOM["request_mix"]), window=5)
    assert {plan.policy.partition(":")[0] for plan in plans} == {name.partition(":")[0] for name in POLICIES}
    assert plans[0].policy in ("joint", "dp")
    joint = next(plan for plan in plans if plan.policy == "joint")
    assert joint.makespan_s == min(plan.makespan_s for plan in plans)
    fixed = {plan.policy for plan in plans if plan.policy.startswith("fixed")}
    assert fixed == set(fixed_sweep(prompts(131072), 64))


@pytest.mark.parametrize("objective", [Objective.MAKESPAN, Objective.MEAN_TTFT])
@pytest.mark.parametrize("seed", range(6))
def test_no_simpler_policy_is_left_out_that_could_be_better(seed: int, objective: Objective) -> None:
    """The floor that leaves policies out is below what they reach."""
    instance = random_instance(seed + 90)
    problem = Problem(
        cost=instance.cost, requests=instance.requests, window=instance.window,
        chunk_multiple=instance.chunk_multiple, objective=objective,
    )  # fmt: skip
    floor, names = Floor(problem), fixed_sweep(problem.requests, problem.chunk_multiple)
    names += [f"{name}:{base}" for base in base_sizes(problem) for name in BASED]
    for name in names:
        reached = problem.evaluate(named_rounds(problem, name)).score(objective)[0]
        assert 0.0 < floor.score(name) <= reached * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", [Objective.MAKESPAN, Objective.MEAN_TTFT])
def test_joint_is_never_worse_than_a_simpler_policy(seed: int, objective: Objective) -> None:
    """Up to NEAR_BOUND of the bound for the makespan; for the mean TTFT among plans that do not give up makespan."""
    instance = random_instance(seed, most_units=40)
    options: RoundOptions = {
        "window": instance.window, "chunk_multiple": instance.chunk_multiple, "objective": objective,
    }  # fmt: skip
    ours = plan_rounds(instance.cost, instance.requests, **options)
    most = NEAR_BOUND * ours.lower_bound_s
    for plan in compare_policies(instance.cost, instance.requests, **options):
        if objective is Objective.MAKESPAN:
            assert ours.makespan_s <= max(plan.makespan_s * (1 + 1e-9), most)
        elif plan.makespan_s <= ours.makespan_s:
            assert ours.evaluation.mean_ttft_s <= plan.evaluation.mean_ttft_s * (1 + 1e-9)


@pytest.mark.parametrize("policy", ["best", "fixed", "fixed:0", "fixed:x", "fixed:63", "joint:3", "sglang:1", ""])
def test_unknown_policies_are_refused(policy: str) -> None:
    with pytest.raises(UserError, match=r"^policy: .*(fixed:N|at least 64)"):
        plan_rounds(atom(2), prompts(100), policy=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": []}, "requests: []; at least one request"),
        ({"window": 0}, "window: 0; at least 1 round"),
        ({"chunk_multiple": 0}, "chunk_multiple: 0; at least 1"),
        ({"limits": Limits(max_round_tokens=63)}, "max_round_tokens: 63; at least 64"),
        ({"limits": Limits(max_kv_tokens=99)}, "max_kv_tokens: 99; at least 100, the longest prompt"),
        ({"max_makespan_increase": -0.01}, "max_makespan_increase: -0.01; a share of at least 0"),
        ({"max_makespan_increase": float("nan")}, "max_makespan_increase: nan; a share of at least 0"),
        ({"objective": "speed"}, "objective: speed; one of makespan, mean-ttft, sla"),
    ],
)
def test_impossible_problems_are_refused(options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"requests": prompts(100), **options}
    with pytest.raises(UserError) as error:
        plan_rounds(atom(2), **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert message in str(error.value)


def test_local_improvement_keeps_the_kv_limit() -> None:
    """Two prompts that the cache cannot hold together gain from sharing a round; that gain may not be taken."""
    stage = StageCost(
        token_count=(195, 305, 512, 577, 1751, 6378),
        token_seconds=(0.003, 0.01806, 0.02404, 0.03991, 0.04817, 0.1),
        attention=TableAttention(
            count=(79, 109, 286, 382, 1338),
            base_s=(0.00114, 0.00195, 0.00477, 0.00783, 0.04497),
            context_s=(1.57e-07, 1.66e-07, 5.03e-07, 6.39e-07, 3.936e-06),
        ),
        round_overhead_s=0.00435,
        chunk_s=0.05,
    )
    requests = [
        Request(id="r0", prompt_tokens=774, cached_tokens=86, weight=5.0),
        Request(id="r1", prompt_tokens=1935, cached_tokens=763, arrival_s=0.1, weight=0.0),
        Request(id="r2", prompt_tokens=2275, arrival_s=0.7, weight=0.0),
        Request(id="r3", prompt_tokens=1, arrival_s=0.1, weight=5.0),
    ]
    cost = CostModel(stages=(stage,), hop_token_s=1e-6, return_s=0.02)
    limits = Limits(max_round_tokens=4096, max_kv_tokens=3412)
    plan = plan_rounds(cost, requests, window=1, chunk_multiple=256, limits=limits, objective=Objective.MEAN_TTFT)
    rounds_of = {j: [i for i, chunks in enumerate(plan.rounds) if any(c.request == j for c in chunks)] for j in (1, 2)}
    assert rounds_of[1][-1] < rounds_of[2][0] or rounds_of[2][-1] < rounds_of[1][0]


@pytest.mark.parametrize("kv_tokens", [None, 80_000, 30_000])
def test_a_draft_of_dear_chunks_is_near_equal_ones(kv_tokens: int | None) -> None:
    """Where each chunk reads the weights of hundreds of experts, whatever its length."""
    stage = StageCost(token_count=(0, 16384), token_seconds=(0.0, 0.49), chunk_s=0.046)
    cost, requests = CostModel(stages=(stage,) * 8, hop_latency_s=1e-5), prompts(*[16384] * 8)
    options: RoundOptions = {
        "window": None, "chunk_multiple": 256, "objective": Objective.MAKESPAN,
        "limits": Limits(max_round_tokens=8192, max_kv_tokens=kv_tokens),
    }  # fmt: skip
    draft, fixed = draft_plan(cost, requests, **options), best_fixed(cost, requests, **options)
    assert draft.makespan_s <= 1.05 * fixed.makespan_s

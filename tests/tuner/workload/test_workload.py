import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from db.errors import UserError
from tests.tuner.atom import atom
from tuner.plan.plan import Request, check_rounds
from tuner.replays.comparison import compare_replays, replay
from tuner.replays.replay import FEW_REQUESTS
from tuner.rounds.problem import Problem
from tuner.search.planner import make_rounds, plan_rounds
from tuner.workload.objective import Objective
from tuner.workload.workload import load_workload

TRACE = Path(__file__).parents[3] / "benchmarks" / "data" / "mooncake_conversation_2000.jsonl"


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_trace_is_read_and_sped_up(tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        {"timestamp": 3000, "input_length": 20, "output_length": 5, "hash_ids": [1]},
        "",
        {"timestamp": 1000, "input_length": 10, "id": "first", "sla_ttft_s": 2.0, "cached_tokens": 4, "weight": 3},
    )
    first, second = load_workload(path, rate=4.0).requests
    assert (first.id, first.prompt_tokens, first.arrival_s) == ("first", 10, 0.0)
    assert (first.sla_ttft_s, first.cached_tokens, first.weight) == (2.0, 4, 3.0)
    assert (second.id, second.prompt_tokens, second.arrival_s) == ("r0", 20, 0.5)
    assert len(load_workload(path, limit=1).requests) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1:"),
        ("[1]", "line 1: content: [1]; an object"),
        ({"timestamp": 0}, "line 1: input_length: missing; a value"),
        ({"input_length": -1}, "line 1: input_length: -1; at least 0"),
        ({"input_length": 5, "delay": -1}, "line 1: delay: -1.0; at least 0"),
        ({"input_length": 5, "timestamp": "x"}, "line 1: timestamp: x"),
        ("[" * 100_000, "line 1: must be JSON nested at most 64 deep"),
        (
            {"input_length": 5, "timestamp": 10**400},
            "line 1: must be JSON with whole numbers of at most 64 bits (timestamp)",
        ),
        ({"input_length": 10**400}, "line 1: must be JSON with whole numbers of at most 64 bits (input_length)"),
        ({"input_length": 2**41}, "line 1: input_length: 2199023255552; at most"),
        ({"input_length": 5, "cached_tokens": 5}, "line 1: cached_tokens: 5"),
        ({"input_length": 5, "sla_ttft_s": -1}, "line 1: sla_ttft_s: -1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_workload(write(tmp_path / "trace.jsonl", line))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    name = "a\u2028b\u2029c\u0085d"
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"input_length": 5, "id": name}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (request,) = load_workload(path).requests
    assert request.id == name


def test_bad_files_and_rates_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one request"):
        load_workload(write(tmp_path / "trace.jsonl", ""))
    with pytest.raises(UserError, match="No such file"):
        load_workload(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="rate: 0"):
        load_workload(TRACE, rate=0)


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_on_the_trace_joint_is_never_worse_than_the_best_swept_fixed_chunk(rate: float) -> None:
    requests = load_workload(TRACE, rate=rate, limit=150).requests
    replays = compare_replays(atom(4), requests, window=5, least_chunk=2048)
    joint = replays[-1]
    assert joint.policy == "joint"
    fixed = [replay for replay in replays if replay.policy.startswith("fixed")]
    assert joint.evaluation.mean_ttft_s <= min(replay.evaluation.mean_ttft_s for replay in fixed)
    assert joint.ttft_s(99) <= min(replay.ttft_s(99) for replay in fixed)
    assert joint.tokens_per_s >= 0.999 * max(replay.tokens_per_s for replay in fixed)


def test_a_long_trace_is_replayed_under_the_likely_policies_alone() -> None:
    requests = load_workload(TRACE, limit=FEW_REQUESTS + 20).requests
    every, likely = (compare_replays(atom(4), requests, window=5, everything=each) for each in (True, False))
    assert len(every) > len(likely) >= 2
    assert any(one.policy.startswith("fixed:") for one in likely)
    assert likely[-1].policy == "joint"
    assert likely[-1].evaluation.mean_ttft_s == every[-1].evaluation.mean_ttft_s


def test_sizes_between_are_tried_where_no_other_policy_keeps_both_limits() -> None:
    """Twelve prompts in bursts: `fixed:8192` has the least mean, and its 99th percentile is 11 % above the least."""
    arrivals_s = [0.0, 0.0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.28, 0.45, 0.55, 0.65, 0.65]
    requests = [Request(id=f"r{i}", prompt_tokens=8192, arrival_s=arrival_s) for i, arrival_s in enumerate(arrivals_s)]
    *simpler, joint = compare_replays(atom(2), requests)
    assert joint.evaluation.mean_ttft_s <= 1.02 * min(one.evaluation.mean_ttft_s for one in simpler)
    assert joint.ttft_s(99) <= 1.05 * min(one.ttft_s(99) for one in simpler)


def test_settings_between_are_tried_where_the_least_mean_and_the_least_p99_lie_apart() -> None:
    """Sixteen prompts, the last ten in a burst: the settings tried first leave the 99th percentile 6 % above."""
    arrivals_s = [0.0, 0.38, 1.06, 1.36, 1.73, 2.45, 4.05, 4.13, 4.31, 4.82, 4.85, 4.91, 4.94, 4.97, 5.13, 5.14]
    requests = [Request(id=f"r{i}", prompt_tokens=16384, arrival_s=arrival_s) for i, arrival_s in enumerate(arrivals_s)]
    *simpler, joint = compare_replays(atom(4), requests)
    assert joint.planned.policy.startswith("joint:")
    assert joint.evaluation.mean_ttft_s <= 1.02 * min(one.evaluation.mean_ttft_s for one in simpler)
    assert joint.ttft_s(99) <= 1.05 * min(one.ttft_s(99) for one in simpler)


def test_rounds_as_for_the_makespan_keep_both_limits_where_a_few_prompts_are_long() -> None:
    """One prompt in ten is 16 times as long as the rest: what is best for the mean alone makes it wait too long."""
    requests = [
        Request(id=f"r{i}", prompt_tokens=65536 if i % 10 == 7 else 4096, arrival_s=0.35 * i) for i in range(60)
    ]
    *simpler, joint = compare_replays(atom(8), requests)
    assert "makespan=1" in joint.planned.policy
    assert joint.evaluation.mean_ttft_s < 0.9 * min(one.evaluation.mean_ttft_s for one in simpler)
    assert joint.ttft_s(99) <= 1.05 * min(one.ttft_s(99) for one in simpler)


def test_rounds_of_one_length_keep_both_limits_under_overload() -> None:
    """Mixed prompts that come faster than they can run: without them nothing is near the least mean and the least 99th
    percentile at once."""
    rng = np.random.default_rng(1)
    lengths = (1024 * 2 ** (5 * rng.random(60))).astype(int).tolist()
    requests = [Request(id=f"r{i}", prompt_tokens=tokens, arrival_s=0.1 * i) for i, tokens in enumerate(lengths)]
    *simpler, joint = compare_replays(atom(2), requests)
    assert "pace=" in joint.planned.policy
    assert joint.evaluation.mean_ttft_s <= 1.02 * min(one.evaluation.mean_ttft_s for one in simpler)
    assert joint.ttft_s(99) <= 1.05 * min(one.ttft_s(99) for one in simpler)


def test_what_a_batch_may_take_longer_for_its_mean_lengthens_no_trace() -> None:
    requests = [
        Request(id=f"r{i}", prompt_tokens=[2048, 65536][i % 5 == 0], arrival_s=0.1 * (i // 8)) for i in range(24)
    ]
    usual, much = (
        replay(atom(4), requests, policy="dp", window=5, max_makespan_increase=each).evaluation for each in (0.02, 0.5)
    )
    assert usual.makespan_s == much.makespan_s
    batch = [replace(request, arrival_s=0.0) for request in requests]
    free = plan_rounds(atom(4), batch, policy="dp", window=5, objective="mean-ttft", max_makespan_increase=0.5)
    kept = plan_rounds(atom(4), batch, policy="dp", window=5, objective="mean-ttft", max_makespan_increase=0.0075)
    assert free.makespan_s > kept.makespan_s  # it would, were it heeded


@pytest.mark.parametrize("policy", ["gpipe", "dp", "terapipe", "ascend", "sglang:8192", "joint"])
def test_no_policy_runs_a_request_before_it_arrives(policy: str) -> None:
    requests = load_workload(TRACE, limit=40).requests
    problem = Problem(cost=atom(4), requests=tuple(requests), window=5, objective=Objective.MEAN_TTFT)
    rounds = make_rounds(problem, policy)
    check_rounds(requests, rounds)
    start_s = problem.evaluate(rounds).timeline.start_s[:, 0]
    for begins, chunks in zip(start_s, rounds, strict=True):
        assert begins >= max(requests[chunk.request].arrival_s for chunk in chunks)


def test_arrivals_too_close_to_tell_apart_are_one() -> None:
    requests = [Request(id=f"r{i}", prompt_tokens=1000, arrival_s=1e-200 * i) for i in range(6)]
    assert replay(atom(2), requests).evaluation.makespan_s > 0.0

"""`isochunk tune --cost-model`: batches and traces planned from a file, without model and database."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from tests.service.test_tune import COST_MODEL, tune, tune_json
from tuner.plan.plan import load_plan


def test_a_cost_model_file_is_planned_without_model_or_database(tmp_path: Path) -> None:
    path, out = tmp_path / "cost.json", tmp_path / "rounds.json"
    path.write_text(json.dumps(COST_MODEL))
    tune("--cost-model", str(path), "--pp-size", "4", "--window", "5", "--prompt-lens", "131072", "-o", str(out))
    plan = load_plan(out)
    assert plan.predicted is not None
    assert plan.predicted.makespan_s < 9.28
    assert plan.predicted.gap is not None
    assert plan.predicted.gap < 0.01


def test_noise_in_a_measured_table_is_smoothed_and_said(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    stage = COST_MODEL["stages"][0]
    for seconds, words in (([0.0, 0.0153, 0.0151], "Smoothed stages[0].tokens.seconds: 2 of 3"), ([0, 1, 0.5], "")):
        tokens = {"count": [0, 512, 1024], "seconds": seconds}
        path.write_text(json.dumps(COST_MODEL | {"stages": [stage | {"tokens": tokens}]}))
        arguments = ("--cost-model", str(path), "--pp-size", "2", "--prompt-lens", "2048")
        if words:
            assert tune_json(*arguments)["notes"][0].startswith(words)
            assert words in tune(*arguments)
        else:
            with pytest.raises(UserError, match=r"seconds\[1\]: 1; time may not fall with more tokens; up to 10%"):
                tune(*arguments)


def test_a_workload_brings_lengths_and_arrivals(tmp_path: Path) -> None:
    cost, workload = tmp_path / "cost.json", tmp_path / "w.jsonl"
    cost.write_text(json.dumps(COST_MODEL))
    workload.write_text('{"timestamp": 0, "input_length": 4096}\n{"timestamp": 3000, "input_length": 8192}\n')
    arguments = ("--cost-model", str(cost), "--pp-size", "2", "--workload", str(workload))
    report = tune_json(*arguments, "--rate", "2", "--compare")
    assert [(r["prompt_tokens"], r["arrival_s"]) for r in report["plan"]["requests"]] == [(4096, 0.0), (8192, 1.5)]
    replays = {replay["policy"]: replay for replay in report["replays"]}
    assert {"fixed:2048", "gpipe", "sglang", "ascend", "terapipe", "dp", "joint"} <= set(replays)
    assert all(0 < one["p50_ttft_s"] <= one["p90_ttft_s"] <= one["p99_ttft_s"] for one in replays.values())
    assert "requests as they arrive" in tune(*arguments)


OVERLOADED_BY_SHORT_ROUNDS = {
    "schema": "isochunk.cost-model/1",
    "stages": [{
        "round_overhead_s": 0.02,
        "tokens": {"count": [0, 1024], "seconds": [0, 0.006]},
        "attention": {"pair_s": 6.5e-10, "context_token_s": 5e-7},
    }],
}  # fmt: skip


@pytest.mark.parametrize("objective", ["makespan", "mean-ttft"])
def test_the_plan_of_a_trace_is_its_best_policy(objective: str, tmp_path: Path) -> None:
    """A prompt every 100 ms that takes 90 ms a stage uncut: rounds cut for latency alone would overload it."""
    cost, workload, out = tmp_path / "cost.json", tmp_path / "w.jsonl", tmp_path / "plan.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    workload.write_text("".join(f'{{"timestamp": {100 * i}, "input_length": 8192}}\n' for i in range(40)))
    report = tune_json(
        "--cost-model", str(cost), "--pp-size", "4", "--workload", str(workload), "--objective", objective,
        "--compare", "-o", str(out),
    )  # fmt: skip
    plan, rows = load_plan(out), report["replays"]
    assert plan.predicted is not None
    assert plan.predicted.makespan_s == pytest.approx(4.2593, abs=1e-4)
    assert sum(plan.predicted.ttft_s) / 40 == pytest.approx(0.3593, abs=1e-4)
    assert plan.predicted.makespan_s <= min(row["makespan_s"] for row in rows)
    assert rows[0]["taken"] == plan.policy
    joint = next(row for row in rows if row["policy"] == "joint")
    assert joint["mean_ttft_s"] == min(row["mean_ttft_s"] for row in rows)


@pytest.mark.parametrize("objective", ["makespan", "mean-ttft", "sla"])
@pytest.mark.parametrize("lengths", ["131072", "65536,2048,16384,900,30000"])
@pytest.mark.parametrize("policy", ["joint", "terapipe"])
def test_the_plan_is_the_best_row_of_its_table(objective: str, lengths: str, policy: str, tmp_path: Path) -> None:
    cost, out = tmp_path / "cost.json", tmp_path / "plan.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    rows = tune_json(
        "--cost-model", str(cost), "--pp-size", "3", "--prompt-lens", lengths, "--objective", objective,
        "--sla-ttft-s", "2", "--policy", policy, "--compare", "-o", str(out),
    )["policies"]  # fmt: skip
    predicted = load_plan(out).predicted
    assert predicted is not None
    planned = next(row for row in rows if row["policy"] == policy)
    assert planned["makespan_s"] == predicted.makespan_s
    if policy == "joint":
        assert rows[0] == planned
        if objective == "makespan":
            assert predicted.makespan_s == min(row["makespan_s"] for row in rows)


def test_a_simple_setting_that_takes_too_long_for_all_is_named_and_not_recommended(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    batch = ("--cost-model", str(cost), "--pp-size", "4", "--prompt-lens", "8192*40", "--objective", "mean-ttft")
    text = " ".join(tune(*batch).split())
    assert re.search(r"by fixed:8192 has [\d.]+% less mean TTFT \(2\.111 s\), but takes [\d.]+% longer for all", text)
    assert re.search(r"Its mean TTFT of [\d.]+ s is at most [\d.]+% above the best possible", text)
    free = tune_json(*batch, "--max-makespan-increase", "none", "--compare")
    least_s = min(row["mean_ttft_s"] for row in free["policies"])
    assert free["mean_ttft_bound_s"] <= least_s <= 1.02 * free["mean_ttft_bound_s"]
    assert tune_json(*batch[:-2])["mean_ttft_bound_s"] is None
    assert free["policies"][0]["mean_ttft_s"] == least_s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "isochunk.cost-model/3"}, "schema: isochunk.cost-model/3; "),
        ({"stages": []}, "stages: "),
        ({"hop": {"latency_s": -1.0}}, "hop.latency_s: -1.0; "),
    ],
)
def test_bad_cost_models_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST_MODEL | change))
    with pytest.raises(UserError) as refused:
        tune("--cost-model", str(path), "--pp-size", "4", "--prompt-lens", "1000")
    assert f"cost.json: {message}" in str(refused.value)


def test_deadlines_of_a_trace_are_met_where_some_policy_meets_them(tmp_path: Path) -> None:
    cost, workload = tmp_path / "cost.json", tmp_path / "w.jsonl"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    workload.write_text("".join(f'{{"timestamp": {100 * i}, "input_length": 8192}}\n' for i in range(8)))
    arguments = ("--cost-model", str(cost), "--pp-size", "4", "--workload", str(workload))
    report = tune_json(*arguments, "--objective", "sla", "--sla-ttft-s", "0.36")
    joint = next(row for row in report["replays"] if row["policy"] == "joint")
    assert joint["sla_met"] == 1.0
    assert joint["lateness_s"] <= 0.0
    assert report["impossible"] == []
    late = tune_json(*arguments, "--objective", "lateness", "--sla-ttft-s", "0.1")
    rows = {row["policy"]: row for row in late["replays"]}
    assert rows["joint"]["lateness_s"] == min(row["lateness_s"] for row in rows.values())
    assert len(late["impossible"]) == 8
    assert "request r0 of 8192 tokens; no plan takes less than 0.2693 s" in late["impossible"][0]


@pytest.mark.parametrize(
    ("objective", "column"),
    [("lateness", "latest s"), ("sla", "met %"), ("p99-ttft", "p99 s"), ("mean-ttft", "mean TTFT s")],
)
def test_what_is_sought_stands_first_in_a_page(objective: str, column: str, tmp_path: Path) -> None:
    cost, workload = tmp_path / "cost.json", tmp_path / "w.jsonl"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    lines = (f'{{"timestamp": {100 * i}, "input_length": {8192 + 977 * i}}}\n' for i in range(6))
    workload.write_text("".join(lines))
    arguments = ("--cost-model", str(cost), "--pp-size", "4", "--objective", objective, "--sla-ttft-s", "0.4")
    for shown in (tune(*arguments, "--workload", str(workload)), tune(*arguments, "--prompt-lens", "8192,4096*2")):
        (head,) = (line for line in shown.splitlines() if line.startswith(" policy"))
        assert len(head) <= 80
        if "makespan s" in head:
            assert head.split("policy")[1].strip().startswith(column)
        else:
            assert column.replace("mean ", "") in head


def test_all_policies_have_their_percentiles(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    rows = tune_json(
        "--cost-model", str(cost), "--pp-size", "4", "--prompt-lens", "8192*3,700,40000", "--objective", "p99-ttft",
        "--compare",
    )["policies"]  # fmt: skip
    assert all(row["p90_ttft_s"] <= row["p99_ttft_s"] <= row["makespan_s"] for row in rows)
    assert any(row["p90_ttft_s"] < row["p99_ttft_s"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "2"), "--rate: 2.0; goes with --workload"),
        (("--time-unit", "s"), "--time-unit: s; goes with --workload"),
        (("--workload-format", "azure"), "--workload-format: azure; goes with --workload"),
        (("--num-requests", "5"), "--num-requests: 5; goes with --workload"),
        (("--prefix-cache", "off"), "--prefix-cache: off; goes with --workload"),
        (("--sla-ttft-s", "inf"), "--sla-ttft-s: inf; must be at most 1e+09"),
    ],
)
def test_options_that_a_batch_does_not_heed_are_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    with pytest.raises(UserError) as refused:
        tune("--cost-model", str(cost), "--pp-size", "4", "--prompt-lens", "1000", *options)
    assert str(refused.value) == message


def test_under_overload_short_prompts_meet_their_deadlines(tmp_path: Path) -> None:
    """Three prompts in four can be in time if those that cannot be wait."""
    cost, workload, out = tmp_path / "cost.json", tmp_path / "w.jsonl", tmp_path / "plan.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    lines = (f'{{"timestamp": {120 * i}, "input_length": {8192 if i % 4 else 40000}}}\n' for i in range(20))
    workload.write_text("".join(lines))
    arguments = ("--cost-model", str(cost), "--pp-size", "4", "--workload", str(workload), "--sla-ttft-s", "1.5")
    joint = tune_json(*arguments, "--objective", "sla", "--compare", "-o", str(out))["replays"][0]
    assert joint["policy"] == "joint" and joint["sla_met"] >= 0.75
    taken = load_plan(out).policy
    assert taken is not None and "least_work=1" in taken
    again = tune_json(*arguments, "--objective", "sla", "--policy", taken)["plan"]
    assert again["rounds"] == json.loads(out.read_text())["rounds"]


def test_settings_tuned_on_a_trace_are_in_its_plan(tmp_path: Path) -> None:
    cost, workload, out = tmp_path / "cost.json", tmp_path / "w.jsonl", tmp_path / "plan.json"
    cost.write_text(json.dumps(OVERLOADED_BY_SHORT_ROUNDS))
    workload.write_text("".join(f'{{"timestamp": {250 * i}, "input_length": 16384}}\n' for i in range(12)))
    arguments = ("--cost-model", str(cost), "--pp-size", "4", "--workload", str(workload))
    tuned = tune_json(*arguments, "--objective", "p99-ttft", "--trials", "3", "-o", str(out))
    plan, rows = load_plan(out), {row["policy"]: row for row in tuned["replays"]}
    assert plan.policy == rows["joint"]["taken"]
    assert rows["joint"]["p99_ttft_s"] == min(row["p99_ttft_s"] for row in rows.values())
    again = tune_json(*arguments, "--objective", "p99-ttft", "--policy", plan.policy)
    assert again["plan"]["rounds"] == tuned["plan"]["rounds"]


def test_a_trace_with_answers_and_classes(tmp_path: Path) -> None:
    cost, workload, out = tmp_path / "cost.json", tmp_path / "w.jsonl", tmp_path / "plan.json"
    cost.write_text(json.dumps(COST_MODEL))
    lines = [
        {"timestamp": 1500 * i, "input_length": 8192, "output_length": 3 + i, "priority": ("chat", "batch")[i % 2]}
        for i in range(8)
    ]
    workload.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    arguments = ("--cost-model", str(cost), "--pp-size", "2", "--workload", str(workload))
    limits = ("--objective", "sla", "--sla-ttft-s", "2", "--sla-tpot-s", "0.3", "--decode", "beside")
    report = tune_json(*arguments, *limits, "--priority", "chat=4", "-o", str(out))
    plan, rows = load_plan(out), {row["policy"]: row for row in report["replays"]}
    assert [request.output_tokens for request in plan.requests] == list(range(3, 11))
    assert [request.weight for request in plan.requests] == [4.0, 1.0] * 4
    assert rows["joint"]["sla_met"] == max(row["sla_met"] for row in rows.values())
    assert all(0.0 < row["mean_tpot_s"] <= row["p99_tpot_s"] and row["goodput_per_s"] >= 0.0 for row in rows.values())
    assert [row["priority"] for row in report["classes"]] == ["batch", "chat"]
    assert 0.0 < report["mean_ttft_bound_s"] <= rows["joint"]["mean_ttft_s"]
    printed = tune(*arguments, *limits)
    assert "goodput/s" in printed
    assert "which counts no decoded token" in " ".join(printed.split())
    elsewhere = tune_json(*arguments)
    assert "mean_tpot_s" not in elsewhere["replays"][0]
    for wrong, message in (
        (("--sla-tpot-s", "0.3"), "--sla-tpot-s: 0.3; goes with --decode beside"),
        (("--priority", "gold=2"), "--priority: gold; one of the workload's: batch, chat"),
        (("--priority", "chat=-1"), "--priority: chat=-1; NAME=WEIGHT"),
    ):
        with pytest.raises(UserError) as refused:
            tune(*arguments, *wrong)
        assert message in str(refused.value)
    workload.write_text('{"timestamp": 0, "input_length": 8192}\n')
    with pytest.raises(UserError, match="--decode: beside; the workload must say output_length"):
        tune(*arguments, "--decode", "beside")

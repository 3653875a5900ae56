"""Traces are well-formed: every round on every stage is a bar, measured and predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from db.rows.runs import RoundTime
from runtime.run.result import RequestResult, RunResult
from runtime.run.trace import MEASURED, PREDICTED, write_trace
from tests.runtime.cases import make_plan
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan, Predicted
from tuner.plan.stage_cost import StageCost
from tuner.rounds.schedule import evaluate

COST = CostModel(stages=(StageCost(token_count=(0, 100), token_seconds=(0.0, 0.1)),), hop_latency_s=0.01)


@pytest.fixture
def plan(checkpoint: Callable[[str], Path]) -> Plan:
    return replace(make_plan(checkpoint("llama")), window=2)


@pytest.fixture
def result(plan: Plan) -> RunResult:
    rounds = tuple(
        RoundTime(round=i, stage=k, start_s=i + k, finish_s=i + k + 0.5)
        for i in range(len(plan.rounds))
        for k in (0, 1)
    )
    requests = tuple(RequestResult(id=request.id, token_ids=(1,), ttft_s=1.0) for request in plan.requests)
    return RunResult(requests=requests, makespan_s=4.5, makespans_s=(4.5,), rounds=rounds, decode_s=())


def _bars(path: Path, process: int) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X" and event["pid"] == process]


def test_measured_rounds_are_bars(plan: Plan, result: RunResult, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, plan, result)
    bars = _bars(path, MEASURED)
    assert [(bar["tid"], bar["name"]) for bar in bars] == [(k, f"round {i}") for i in range(4) for k in (0, 1)]
    assert (bars[3]["ts"], bars[3]["dur"]) == (2e6, 0.5e6)
    assert bars[2]["args"] == {"tokens": 61, "chunks": "r1[0:60], r0[100:101]"}
    assert _bars(path, PREDICTED) == []
    names = [e["args"]["name"] for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "M"]
    assert names == ["measured", "stage 0 (2 layers)", "stage 1 (3 layers)"]


def test_the_cost_model_gives_the_predicted_bars(plan: Plan, result: RunResult, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, replace(plan, cost_model=COST.to_json()), result)
    timeline = evaluate(COST.for_pp_size(2), plan.requests, plan.rounds, 2).timeline
    ends = [bar["ts"] + bar["dur"] for bar in _bars(path, PREDICTED)]
    assert ends == pytest.approx([1e6 * finish for stages in timeline.finish_s for finish in stages])


def test_round_seconds_do_without_a_cost_model(plan: Plan, result: RunResult, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    round_s = ((1.0, 2.0),) * 4
    write_trace(path, replace(plan, predicted=Predicted(makespan_s=9.0, round_s=round_s)), result)
    assert max(bar["ts"] + bar["dur"] for bar in _bars(path, PREDICTED)) == pytest.approx(9e6)

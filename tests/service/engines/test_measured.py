"""What engines' benchmarks and metrics say of a plan's batch, beside the prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from db.errors import UserError
from db.rows.hardware import save_hardware
from db.rows.runs import RunKind, list_runs
from db.store.engine import open_database
from service.cli.main import cli
from service.engines.measured import Measured, read_measured
from tests.db.samples import make_hardware
from tuner.plan.plan import Chunk, Parallel, Plan, Predicted, Request, save_plan

METRICS = """# HELP vllm:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="1.0",model_name="m"} 2.0
vllm:time_to_first_token_seconds_bucket{le="2.0",model_name="m"} 8.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
vllm:time_to_first_token_seconds_count{model_name="m"} 10.0
vllm:time_to_first_token_seconds_sum{model_name="m"} 17.0
"""
VLLM: dict[str, Any] = {
    "backend": "openai", "duration": 3.0, "completed": 2, "input_lens": [50, 100], "ttfts": [1.0, 1.5],
    "start_times": [10.0, 10.2], "errors": ["", ""], "mean_ttft_ms": 1250.0, "request_rate": "inf",
}  # fmt: skip
SGLANG: dict[str, Any] = {
    "backend": "sglang", "duration": 3.0, "completed": 2, "input_lens": [100, 50], "ttfts": [1.7, 1.2], "tag": None,
}  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    return Plan(
        model={},
        precision="bfloat16",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(1,)),
        window=None,
        requests=(Request(id="a", prompt_tokens=100), Request(id="b", prompt_tokens=50)),
        rounds=((Chunk(request=0, start=0, tokens=100), Chunk(request=1, start=0, tokens=50)),),
        predicted=Predicted(makespan_s=1.6, ttft_s=(1.6, 1.1)),
    )


def read(folder: Path, text: str, plan: Plan) -> Measured:
    path = folder / "measured"
    path.write_text(text)
    return read_measured(path, plan)


def test_requests_are_told_apart_by_their_lengths(plan: Plan, tmp_path: Path) -> None:
    vllm = read(tmp_path, json.dumps(VLLM), plan)
    assert vllm.ttft_s == (1.5, 1.0)
    assert vllm.makespan_s == pytest.approx(1.7)  # 10.2 + 1.5 - 10
    lines = json.dumps(SGLANG | {"ttfts": [9.0, 9.0]}) + "\n" + json.dumps(SGLANG) + "\n"
    sglang = read(tmp_path, lines, plan)
    assert (sglang.ttft_s, sglang.makespan_s) == ((1.7, 1.2), 1.7)
    figures = {one.name: one for one in sglang.figures}
    assert figures["makespan"].error == pytest.approx(1.6 / 1.7 - 1)
    assert figures["TTFT mean"].predicted_s == pytest.approx(1.35)
    assert figures["TTFT p50"].measured_s == 1.2


def test_summaries_and_metrics_stand_beside_the_prediction_too(plan: Plan, tmp_path: Path) -> None:
    short = {name: value for name, value in VLLM.items() if name not in ("ttfts", "input_lens")}
    assert [one.measured_s for one in read(tmp_path, json.dumps(short, indent=1), plan).figures] == [1.25]
    found = read(tmp_path, METRICS, plan)
    assert found.num_requests == 10
    seconds = {one.name: one.measured_s for one in found.figures}
    assert seconds == {"TTFT mean": pytest.approx(1.7), "TTFT p50": pytest.approx(1.5)}  # p90 is beyond the last bucket


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (VLLM | {"input_lens": [50, 99]}, "must hold 100 for a"),
        (VLLM | {"input_lens": [50], "ttfts": [1.0]}, "must be the plan's 2 requests"),
        (VLLM | {"ttfts": [1.0]}, "must be as many as input_lens"),
        (VLLM | {"ttfts": [1.0, "soon"]}, "ttfts"),
        (VLLM | {"errors": ["", "timeout"]}, "a failed request has no TTFT"),
        ({"completed": 1}, "must tell TTFT"),
        ("{", "must be JSON, JSON lines or Prometheus"),
        ("vllm:other 1\n", "must hold a histogram"),
        ("\x00 ]", "must"),
    ],
)
def test_what_is_of_another_batch_or_kind_is_refused(plan: Plan, tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, content if isinstance(content, str) else json.dumps(content), plan)


def test_a_comparison_is_kept_as_a_run(plan: Plan, tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.json", plan)
    (tmp_path / "bench.json").write_text(json.dumps(VLLM))
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    with open_database(url) as database:
        hardware_id = save_hardware(database, make_hardware())
    words = ["compare", str(tmp_path / "plan.json"), str(tmp_path / "bench.json"), "--keep", str(hardware_id)]
    done = CliRunner().invoke(cli, [*words, "--db", url], catch_exceptions=False)
    assert "Kept as run 1" in done.output
    with open_database(url) as database:
        (run,) = list_runs(database)
    assert (run.kind, run.makespan_s, run.predicted_makespan_s) == (RunKind.ENGINE, pytest.approx(1.7), 1.6)
    assert run.ttft_s == [1.5, 1.0]

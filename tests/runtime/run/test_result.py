"""How the ranks' times become one timeline, and what the result says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.job.job import Pass, RankReport
from runtime.run.prediction import Prediction
from runtime.run.result import RunResult, cut_at_end, make_result, merge_passes
from runtime.weights.generation import end_ids
from tests.runtime.cases import make_job, prompts, requests
from tuner.plan.plan import Chunk
from tuner.recurrence.timeline import Timeline


def _pass(origin_s: float, *rounds: tuple[float, float]) -> Pass:
    return Pass(origin_s=origin_s, rounds=rounds)


def test_ranks_of_one_host_are_laid_on_one_clock() -> None:
    timeline = merge_passes([(0, "a", _pass(10.0, (0.0, 1.0))), (1, "a", _pass(10.5, (0.6, 1.5)))])
    assert timeline.intervals == (((0.0, 1.0), (1.1, 2.0)),)
    assert timeline.makespan_s == 2.0


def test_over_hosts_each_start_stands_for_the_common_one() -> None:
    timeline = merge_passes([(0, "a", _pass(10.0, (0.0, 1.0))), (1, "b", _pass(9000.5, (1.1, 2.0)))])
    assert timeline.intervals == (((0.0, 1.0), (1.1, 2.0)),)


def test_of_a_stages_ranks_the_first_start_and_the_last_finish_count() -> None:
    timeline = merge_passes([(0, "a", _pass(1.0, (0.1, 0.8))), (0, "a", _pass(1.0, (0.2, 0.9)))])
    assert timeline.intervals == (((0.1, 0.9),),)


def test_groups_of_a_stage_are_laid_out_by_round() -> None:
    parts = [(0, "a", _pass(1.0, (0.0, 0.1))), (2, "a", _pass(1.0, (0.3, 0.4))), (1, "a", _pass(1.0, (0.1, 0.2)))]
    assert merge_passes(parts).intervals == (((0.0, 0.1), (0.1, 0.2), (0.3, 0.4)),)


@pytest.fixture
def result(checkpoint: Callable[[str], Path]) -> RunResult:
    """Two requests, three rounds, one stage, three passes of which the second has the median makespan."""
    job = make_job(
        checkpoint("llama"), pp_size=1, repeat=3, max_new_tokens=3, requests=requests(8) + requests(4, arrival_s=0.5),
        rounds=((Chunk(0, 0, 4),), (Chunk(1, 0, 4),), (Chunk(0, 4, 4),)), prompts=prompts(8, 4),
    )  # fmt: skip
    passes = tuple(_pass(float(i), (0.0, 1.0), (1.0, 2.0), (2.0, 3.0 + end)) for i, end in enumerate((0.5, 0.2, 0.1)))
    report = RankReport(
        stage=0, groups=(0,), host="a", warm_up_s=0.5, first=_pass(0.0, (0.0, 0.9), (0.9, 1.8), (1.8, 2.7)),
        passes=passes, decode=_pass(9.0, (0.1, 0.25), (0.3, 0.45)), token_ids=((5, 6, 7), (8, 2, 9)),
    )  # fmt: skip
    timeline = Timeline(np.array([[0.0], [0.9], [2.0]]), np.array([[0.9], [2.0], [3.0]]))
    prediction = Prediction(makespan_s=3.0, timeline=timeline)
    return make_result(job, [report], prediction=prediction, end_ids=frozenset({2}))


def test_the_pass_with_the_median_makespan_counts(result: RunResult) -> None:
    assert result.makespan_s == pytest.approx(3.2)
    assert result.makespans_s == pytest.approx((3.5, 3.2, 3.1))
    assert result.rested_makespan_s == pytest.approx(2.7)
    assert result.rounds[2].finish_s == pytest.approx(3.2)
    assert [time.predicted_s for time in result.rounds] == pytest.approx([0.9, 1.1, 1.0])
    assert result.error == pytest.approx(3.0 / 3.2 - 1)


def test_a_request_is_done_with_its_last_chunk(result: RunResult) -> None:
    assert [request.ttft_s for request in result.requests] == pytest.approx([3.2, 1.5])
    assert [request.token_ids for request in result.requests] == [(5, 6, 7), (8, 2)]
    assert result.decode_s == pytest.approx((0.25, 0.2))


def test_the_output_is_json(result: RunResult) -> None:
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["requests"][0] == {"id": "r0", "token_ids": [5, 6, 7], "ttft_s": pytest.approx(3.2)}
    assert content["rounds"][0] == {"round": 0, "stage": 0, "predicted_s": 0.9, "start_s": 0.0, "finish_s": 1.0}
    assert content["makespan_s"] == pytest.approx(3.2)


def test_tokens_end_with_the_first_that_ends_a_text() -> None:
    assert cut_at_end((1, 2, 3, 2), frozenset({2, 9})) == (1, 2)
    assert cut_at_end((1, 3), frozenset()) == (1, 3)


def test_end_ids_are_read_as_generate_reads_them(tmp_path: Path) -> None:
    assert end_ids(None) == end_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_ids(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert end_ids(tmp_path) == {4, 5}

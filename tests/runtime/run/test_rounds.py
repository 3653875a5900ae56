"""What a plan says beside its chunks: window, arrivals, cached tokens, passes, several requests in a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from runtime.job.job import RankReport, RunJob
from runtime.run.prediction import Prediction
from runtime.run.rank import run_jobs
from runtime.run.result import RunResult, make_result
from tests.runtime.cases import make_job, prompts, requests
from tests.runtime.conftest import Generate
from tuner.plan.plan import Chunk, Round

FIXED: tuple[Round, ...] = tuple((Chunk(0, start, min(40, 202 - start)),) for start in range(0, 202, 40))
ARRIVAL_S = 0.4


@dataclass(frozen=True)
class Ran:
    job: RunJob
    reports: tuple[RankReport, ...]
    result: RunResult


def _jobs(weights: Path) -> dict[str, RunJob]:
    job = make_job(weights, max_new_tokens=3)
    one = replace(job, requests=requests(202), prompts=prompts(202), rounds=FIXED)
    late = requests(202) + requests(97, arrival_s=ARRIVAL_S)
    cached = requests(202, cached_tokens=77) + requests(97, cached_tokens=1)
    return {
        "window 1": replace(one, window=1),
        "window 2": replace(one, window=2),
        "gpipe": replace(one, rounds=((Chunk(0, 0, 202),),)),
        "one round": replace(job, rounds=((Chunk(1, 0, 97), Chunk(0, 0, 202)),)),
        "arrival": replace(job, requests=(late[0], replace(late[1], id="r1"))),
        "cached": replace(
            job,
            requests=(cached[0], replace(cached[1], id="r1")),
            rounds=((Chunk(0, 77, 60), Chunk(1, 1, 96)), (Chunk(0, 137, 65),)),
        ),
        "three passes": replace(job, repeat=3),
        "settled": replace(job, settle_s=0.05, window=1),
        "many rounds": replace(one, rounds=tuple((Chunk(0, start, 1),) for start in range(202)), window=7),
    }


@pytest.fixture(scope="module")
def ran(checkpoint: Callable[[str], Path]) -> dict[str, Ran]:
    """All jobs, run by the same two ranks."""
    jobs = _jobs(checkpoint("llama"))
    reports = run_ranks(run_jobs, list(jobs.values()), world_size=2, device_type="cpu", num_threads=1)
    nothing = Prediction(makespan_s=None, timeline=None)
    return {
        name: Ran(job, tuple(ranks), make_result(job, ranks, prediction=nothing, end_ids=frozenset()))
        for (name, job), *ranks in zip(jobs.items(), *reports, strict=True)
    }


@pytest.mark.timeout(120)
def test_tokens_equal(ran: dict[str, Ran], generate: Generate) -> None:
    for name, run in ran.items():
        expected = [generate(run.job.weights, prompt, 3) for prompt in run.job.prompts]
        assert [list(request.token_ids) for request in run.result.requests] == [list(ids) for ids in expected], name


@pytest.mark.timeout(120)
def test_rounds_keep_their_order(ran: dict[str, Ran]) -> None:
    for name, run in ran.items():
        times = {(time.round, time.stage): time for time in run.result.rounds}
        assert len(times) == 2 * len(run.job.rounds), name
        for (index, stage), time in times.items():
            assert 0 <= time.start_s < time.finish_s
            if stage:
                assert time.start_s >= times[index, stage - 1].finish_s, f"{name}: round {index} ran before its input"
            if index:
                assert time.start_s >= times[index - 1, stage].finish_s, f"{name}: rounds {index - 1}, {index} overlap"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "window"), [("window 1", 1), ("window 2", 2), ("many rounds", 7)])
def test_window_bounds_rounds_in_flight(ran: dict[str, Ran], name: str, window: int) -> None:
    times = {(time.round, time.stage): time for time in ran[name].result.rounds}
    for index in range(window, len(ran[name].job.rounds)):
        assert times[index, 0].start_s >= times[index - window, 1].finish_s


@pytest.mark.timeout(120)
def test_a_round_waits_for_its_requests(ran: dict[str, Ran]) -> None:
    result = ran["arrival"].result
    starts = {time.round: time.start_s for time in result.rounds if time.stage == 0}
    assert starts[0] < ARRIVAL_S <= starts[1]
    # TTFT counts from the arrival, the makespan from the start.
    assert result.requests[1].ttft_s == pytest.approx(result.makespan_s - ARRIVAL_S)
    assert result.requests[0].ttft_s == pytest.approx(result.makespan_s)


@pytest.mark.timeout(120)
def test_passes_are_all_reported(ran: dict[str, Ran]) -> None:
    result = ran["three passes"].result
    assert len(result.makespans_s) == 3
    assert result.makespan_s == sorted(result.makespans_s)[1]
    assert len(result.decode_s) == 2


def test_cached_tokens_are_filled_in_rounds_no_larger_than_the_plans(checkpoint: Callable[[str], Path]) -> None:
    job = replace(
        make_job(checkpoint("llama")),
        requests=requests(202, cached_tokens=150),
        rounds=((Chunk(0, 150, 40),), (Chunk(0, 190, 12),)),
    )
    assert job.cached_rounds == [(Chunk(0, start, min(40, 150 - start)),) for start in (0, 40, 80, 120)]

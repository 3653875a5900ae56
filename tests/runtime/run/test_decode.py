"""Decode: one recorded step, run again and again, is a forward of one token of every request each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from profiler.comm.ranks.mark import Progress
from profiler.sequence.kind import SequenceCut
from runtime.job.job import RunJob
from runtime.job.place import Place
from runtime.run.clock import make_clock
from runtime.run.pipeline import Pipeline
from runtime.stage.share import RoundShare
from runtime.stage.stage import KernelStage
from tests.runtime.cases import ALONE, make_job, prompts, requests
from tests.runtime.conftest import Generate
from tuner.plan.plan import Chunk, Round

CPU = torch.device("cpu")
LENGTHS = (30, 1, 77, 12, 5, 64, 9)
NEW_TOKENS = 12


@pytest.fixture
def job(checkpoint: Callable[[str], Path]) -> RunJob:
    """Many requests of unequal lengths on one rank."""
    whole = tuple((Chunk(index, 0, length),) for index, length in enumerate(LENGTHS))
    return make_job(
        checkpoint("llama"), pp_size=1, requests=requests(*LENGTHS), prompts=prompts(*LENGTHS), rounds=whole,
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip


def _stage(job: RunJob) -> KernelStage:
    return KernelStage(job, Place.of(0, job.parallel), ALONE, CPU)


@pytest.fixture
def pipeline(job: RunJob, tmp_path: Path) -> Pipeline:
    clock = make_clock(CPU)
    clock.begin()
    place = Place.of(0, job.parallel)
    pipeline = Pipeline(job, place, ALONE, _stage(job), clock, Progress(tmp_path / "progress", pid=1))
    pipeline.warm_up()
    return pipeline


def whole(chunks: Round) -> RoundShare:
    return RoundShare.of(chunks, SequenceCut.WHOLE, size=1, rank=0)


@torch.inference_mode()
def test_steps_equal_forwards(job: RunJob) -> None:
    torch.manual_seed(0)
    stepped, forwarded = _stage(job), _stage(job)
    for stage in (stepped, forwarded):
        for chunks, ids in zip(job.rounds, job.prompts, strict=True):
            stage.forward(whole(chunks), stage.embed(torch.tensor(ids)))
    for step in range(NEW_TOKENS - 1):
        hidden = torch.randn(len(LENGTHS), job.shape.hidden_size)
        chunks = tuple(Chunk(index, length + step, 1) for index, length in enumerate(LENGTHS))
        torch.testing.assert_close(stepped.forward_step(hidden), forwarded.forward(whole(chunks), hidden))
    assert stepped.scheme.step.positions.tolist() == [length + NEW_TOKENS - 1 for length in LENGTHS]
    torch.testing.assert_close(stepped.slab.keys, forwarded.slab.keys)
    torch.testing.assert_close(stepped.slab.values, forwarded.slab.values)


@torch.inference_mode()
def test_decode_equals_generate_again_and_again(job: RunJob, pipeline: Pipeline, generate: Generate) -> None:
    pipeline.record()
    expected = [generate(job.weights, prompt, NEW_TOKENS) for prompt in job.prompts]
    for _ in range(2):
        pipeline.prefill()
        found = pipeline.decode(NEW_TOKENS - 1)
        assert [tuple(ids) for ids in found.T.tolist()] == expected


@torch.inference_mode()
def test_decode_replays_one_recording_on_memory_that_stays(
    job: RunJob, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Callable[[], Any]] = []

    def record(work: Callable[[], Any], *_: object) -> Callable[[], Any]:
        recorded.append(work)
        return work

    monkeypatch.setattr("runtime.run.pipeline.record", record)
    pipeline.record()
    assert len(recorded) == len(job.rounds) + 1
    pipeline.prefill()
    monkeypatch.delattr(Pipeline, "_compute_step")  # decode has nothing but the recording
    kept = pipeline.next_ids, pipeline.stage.scheme.step.positions
    addresses = [tensor.data_ptr() for tensor in kept]
    pipeline.decode(3)
    assert [tensor.data_ptr() for tensor in (pipeline.next_ids, pipeline.stage.scheme.step.positions)] == addresses
    pipeline.close()
    assert not pipeline.recorded_steps


def test_nothing_is_recorded_for_one_new_token(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    job = make_job(checkpoint("llama"), pp_size=1)
    place = Place.of(0, job.parallel)
    with torch.inference_mode():
        pipeline = Pipeline(job, place, ALONE, _stage(job), make_clock(CPU), Progress(tmp_path / "progress", pid=1))
        pipeline.record()
        assert not pipeline.recorded_steps

"""Stages of several groups of layers: greedy tokens in float32 equal those of Transformers, in loops and in V order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from profiler.sequence.kind import SPKind
from runtime.job.job import RunJob
from runtime.job.place import Place
from runtime.run.rank import run_jobs
from runtime.run.task import tasks_of
from tests.checkpoints import write_checkpoint
from tests.runtime.cases import make_job, prompts, requests
from tests.runtime.conftest import Generate
from tuner.plan.plan import Chunk, Parallel, Round
from tuner.plan.stage_order import StageOrder

NEW_TOKENS = 4
LENGTHS = (202, 97, 3)
ROUNDS: tuple[Round, ...] = (
    (Chunk(0, 0, 100),),
    (Chunk(1, 0, 60), Chunk(0, 100, 1), Chunk(2, 0, 1)),
    (Chunk(2, 1, 2),),
    (Chunk(0, 101, 37),),
    (Chunk(0, 138, 40), Chunk(1, 60, 37)),
    (Chunk(0, 178, 24),),
)
CACHED = 70  # of the first request
LOOP, V = StageOrder.LOOP, StageOrder.V


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout, a model, a window, and whether a prefix is cached."""

    variant: str
    parallel: Parallel
    window: int | None = None
    is_cached: bool = False


def layout(
    pp: int, order: StageOrder, partition: tuple[int, ...], *, tp: int = 1, sp: int = 1, kind: SPKind = SPKind.NONE
) -> Parallel:
    return Parallel(
        tp_size=tp, sp_size=sp, sp_kind=kind, pp_size=pp, virtual_stages=len(partition) // pp, stage_order=order,
        layer_partition=partition,
    )  # fmt: skip


LAYOUTS: dict[int, list[Parallel]] = {
    1: [layout(1, order, (2, 3)) for order in (LOOP, V)],
    2: [layout(2, order, partition) for order in (LOOP, V) for partition in ((1, 1, 2, 1), (2, 1, 1, 1))],
    4: [layout(2, LOOP, (1, 2, 1, 1), tp=2), layout(2, V, (1, 2, 1, 1), tp=2)]
    + [layout(2, LOOP, (1, 2, 1, 1), sp=2, kind=kind) for kind in (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)]
    + [layout(2, V, (1, 2, 1, 1), tp=2, kind=SPKind.MEGATRON)],
}
SIX_LAYERS: dict[int, list[Parallel]] = {
    2: [layout(2, order, (1,) * 6) for order in (LOOP, V)],
    3: [layout(3, order, (1,) * 6) for order in (LOOP, V)],
}


def cases(layouts: list[Parallel], variants: tuple[str, ...]) -> Iterator[Case]:
    for parallel in layouts:
        for number, variant in enumerate(variants):
            yield Case(variant=variant, parallel=parallel, window=(None, 1, 3)[number % 3])
        yield Case(variant=variants[0], parallel=parallel, window=2, is_cached=True)


def job_of(case: Case, folder: Path) -> RunJob:
    asked, rounds = requests(*LENGTHS), ROUNDS
    if case.is_cached:
        asked = (replace(asked[0], cached_tokens=CACHED), *asked[1:])
        rounds = ((Chunk(0, CACHED, 100 - CACHED),), *ROUNDS[1:])
    return make_job(
        folder, parallel=case.parallel, requests=asked, prompts=prompts(*LENGTHS), rounds=rounds, window=case.window,
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip


def check_tokens(chosen: list[Case], checkpoint: Callable[[str], Path], generate: Generate, world_size: int) -> None:
    jobs = [job_of(case, checkpoint(case.variant)) for case in chosen]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for case, job, *ranks in zip(chosen, jobs, *reports, strict=True):
        expected = [generate(checkpoint(case.variant), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        assert found == [expected], f"{case}: {found} instead of {expected}"
        for rank in ranks:
            assert all(len(one.rounds) == len(ROUNDS) * case.parallel.virtual_stages for one in rank.passes)


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("six"), num_hidden_layers=6)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_tokens_equal(world_size: int, checkpoint: Callable[[str], Path], generate: Generate) -> None:
    variants = ("llama", "qwen2", "qwen3") if world_size < 4 else ("llama",)
    check_tokens(list(cases(LAYOUTS[world_size], variants)), checkpoint, generate, world_size)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", SIX_LAYERS)
def test_tokens_equal_with_six_layers(world_size: int, six_layers: Path, generate: Generate) -> None:
    check_tokens(list(cases(SIX_LAYERS[world_size], ("llama",) * 3)), lambda _: six_layers, generate, world_size)


def test_places_and_messages_of_both_orders() -> None:
    parallel = layout(3, V, (1, 2, 1, 1, 2, 1))
    middle = Place.of(1, parallel)
    assert middle.groups == (1, 4) and middle.layers == (1, 2, 5, 6) and middle.layers_of(4) == slice(2, 4)
    assert Place.of(0, parallel).is_last and Place.of(0, parallel).is_first and not Place.of(2, parallel).is_last
    fold = tasks_of(parallel, 2, 2)
    assert [(task.group, task.source, task.target) for task in fold.tasks] == [(2, 1, None), (3, None, 1)] * 2
    loop = tasks_of(layout(2, LOOP, (1,) * 4), 0, 1)
    assert [(task.group, task.source, task.target, task.sent) for task in loop.tasks] == [(0, None, 1, 0), (2, 1, 1, 1)]
    assert [one.after for one in loop.announced[1]] == [1]  # what comes back is not waited for before it has left

"""Sequence parallelism: greedy tokens in float32 equal those of Transformers, for every kind, cut and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from profiler.sequence.kind import CUTS, SequenceCut, SPKind
from runtime.job.job import RunJob
from runtime.run.rank import run_jobs
from tests.runtime.cases import PARTITIONS, make_job, prompts, requests
from tests.runtime.conftest import Generate
from tuner.plan.plan import Chunk, Parallel, Round, Weights

NEW_TOKENS = 5
VARIANTS = ("llama", "qwen2", "qwen3", "llama-bias-one-kv-head", "olmo2", "phi3")
GATHER, ULYSSES, RING, MEGATRON = SPKind.GATHER, SPKind.ULYSSES, SPKind.RING, SPKind.MEGATRON
LENGTHS = (202, 97, 3)
# Chunks of 100, 1, 37 and 64 tokens, rounds with one request and with three, one of two tokens for four ranks.
ROUNDS: tuple[Round, ...] = (
    (Chunk(0, 0, 100),),
    (Chunk(1, 0, 60), Chunk(0, 100, 1), Chunk(2, 0, 1)),
    (Chunk(2, 1, 2),),
    (Chunk(0, 101, 37),),
    (Chunk(0, 138, 64), Chunk(1, 60, 37)),
)
CACHED = 70  # of the first request


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout, a model, and how its rounds are cut."""

    variant: str
    parallel: Parallel
    cuts: tuple[SequenceCut, ...] = ()
    cached_tokens: int = 0


def layout(kind: SPKind, *, tp: int = 1, sp: int = 1, pp: int = 1) -> Parallel:
    return Parallel(tp_size=tp, pp_size=pp, sp_size=sp, sp_kind=kind, layer_partition=PARTITIONS[pp])


LAYOUTS: dict[int, list[Parallel]] = {
    2: [layout(kind, sp=2) for kind in (GATHER, ULYSSES, RING)] + [layout(MEGATRON, tp=2)],
    4: [
        *(layout(kind, sp=4) for kind in (GATHER, ULYSSES, RING)),
        *(layout(kind, sp=2, tp=2) for kind in (GATHER, ULYSSES, RING)),
        *(layout(kind, sp=2, pp=2) for kind in (GATHER, ULYSSES, RING)),
        layout(MEGATRON, tp=4),
        layout(MEGATRON, tp=2, pp=2),
    ],
    6: [layout(kind, sp=3, pp=2) for kind in (GATHER, ULYSSES, RING)],
    8: [
        *(layout(kind, sp=4, tp=2) for kind in (GATHER, RING)),
        *(layout(kind, sp=2, tp=2, pp=2) for kind in (GATHER, ULYSSES, RING)),
        *(layout(kind, sp=4, pp=2) for kind in (GATHER, ULYSSES, RING)),
        layout(MEGATRON, tp=4, pp=2),
    ],
}


def cases(world_size: int) -> Iterator[Case]:
    """Every layout with a cached prefix and mixed cuts; on two and four ranks also without, and with gathered weights.

    On two ranks each model runs with two kinds at least, the one with fewer KV heads than ranks with all.
    """
    for index, parallel in enumerate(LAYOUTS[world_size]):
        cuts = CUTS[parallel.sp_kind]
        mixed = tuple(cuts[at % len(cuts)] for at in range(len(ROUNDS)))
        other = VARIANTS[1 + index % (len(VARIANTS) - 1)]
        if world_size <= 4:
            yield Case(variant=VARIANTS[0], parallel=parallel)
        if world_size == 2:
            for number, variant in enumerate(VARIANTS[1:]):
                if (number + index) % 2 == 0 or variant == "llama-bias-one-kv-head":
                    yield Case(variant=variant, parallel=parallel, cuts=mixed)
        if parallel.sp_size > 1 and (world_size == 2 or (world_size, parallel.pp_size) == (4, 2)):
            yield Case(variant=other, parallel=replace(parallel, weights=Weights.GATHERED), cuts=mixed)
        yield Case(variant=other, parallel=parallel, cuts=tuple(reversed(mixed)), cached_tokens=CACHED)


def job_of(case: Case, folder: Path) -> RunJob:
    asked = requests(*LENGTHS)
    rounds, cuts = ROUNDS, case.cuts
    if case.cached_tokens:
        asked = (replace(asked[0], cached_tokens=case.cached_tokens), *asked[1:])
        rounds = ((Chunk(0, case.cached_tokens, 100 - case.cached_tokens),), *ROUNDS[1:])
    return make_job(
        folder, parallel=case.parallel, requests=asked, prompts=prompts(*LENGTHS), rounds=rounds, cuts=cuts,
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_tokens_equal(world_size: int, checkpoint: Callable[[str], Path], generate: Generate) -> None:
    chosen = list(cases(world_size))
    jobs = [job_of(case, checkpoint(case.variant)) for case in chosen]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    wrong = []
    for case, job, *ranks in zip(chosen, jobs, *reports, strict=True):
        expected = [generate(checkpoint(case.variant), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        if found != [expected]:
            wrong.append((case, found, expected))
    assert not wrong, f"{len(wrong)} of {len(chosen)}: {wrong[0]}"

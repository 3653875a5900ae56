"""Greedy tokens in float32 of every architecture with kernels here equal those of Transformers, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from profiler.model.architectures.table import ARCHITECTURES
from runtime.run.rank import run_jobs
from tests.runtime.cases import make_job
from tests.runtime.conftest import Generate

NEW_TOKENS = 4
EXAMPLES = [name for name, architecture in ARCHITECTURES.items() if architecture.example]
# (tp_size, pp_size) by the number of ranks.
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3)]}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_tokens_equal(world_size: int, checkpoint: Callable[[str], Path], generate: Generate) -> None:
    cases = [(name, layout) for name in EXAMPLES for layout in LAYOUTS[world_size]]
    jobs = [
        make_job(checkpoint(name), tp_size=tp_size, pp_size=pp_size, max_new_tokens=NEW_TOKENS)
        for name, (tp_size, pp_size) in cases
    ]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for case, job, *ranks in zip(cases, jobs, *reports, strict=True):
        assert job.shape.backend == "own", case
        expected = [generate(checkpoint(case[0]), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        assert found == [expected], f"{case}: {found} instead of {expected}"
        assert len({token for tokens in expected for token in tokens}) > 1  # not one token over and over

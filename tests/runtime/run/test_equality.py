"""Greedy tokens in float32 equal those of Transformers' `generate`, for every layout and architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from runtime.run.rank import run_jobs
from tests.checkpoints import VARIANTS
from tests.runtime.cases import make_job
from tests.runtime.conftest import Generate

NEW_TOKENS = 5
# (tp_size, pp_size) by the number of ranks. With four ranks every variant has fewer KV heads than ranks or as many.
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3)], 4: [(2, 2), (4, 1)]}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_tokens_equal(world_size: int, checkpoint: Callable[[str], Path], generate: Generate) -> None:
    cases = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS[world_size]]
    jobs = [
        make_job(checkpoint(variant), tp_size=tp_size, pp_size=pp_size, max_new_tokens=NEW_TOKENS)
        for variant, (tp_size, pp_size) in cases
    ]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for case, job, *ranks in zip(cases, jobs, *reports, strict=True):
        expected = [generate(checkpoint(case[0]), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        assert found == [expected], f"{case}: {found} instead of {expected}"

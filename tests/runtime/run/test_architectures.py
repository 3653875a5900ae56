"""Greedy tokens in float32 of every architecture with kernels here equal those of Transformers, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.comm.ranks.launch import run_ranks
from profiler.model.architectures.table import ARCHITECTURES
from profiler.sequence.kind import SPKind
from runtime.run.rank import run_jobs
from tests.runtime.cases import PARTITIONS, make_job
from tests.runtime.conftest import Generate
from tuner.plan.plan import Parallel

NEW_TOKENS = 4
EXAMPLES = [name for name, architecture in ARCHITECTURES.items() if architecture.example]
MIXTURES = [name for name in EXAMPLES if "num_experts_per_tok" in ARCHITECTURES[name].example]
LATENTS = [name for name in EXAMPLES if "kv_lora_rank" in ARCHITECTURES[name].example]
# (tp_size, pp_size, ep_size) by the number of ranks; experts are spread where there are any, unevenly in most examples.
LAYOUTS = {2: [(1, 2, 1), (2, 1, 1), (2, 1, 2)], 3: [(1, 3, 1)], 4: [(4, 1, 4), (2, 2, 2)]}
BETWEEN = (4, 1, 2)  # experts over two halves of the ranks, each cut within its half


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_tokens_equal(world_size: int, checkpoint: Callable[[str], Path], generate: Generate) -> None:
    cases = [
        (name, layout) for layout in LAYOUTS[world_size] for name in (EXAMPLES if layout[2] == 1 else MIXTURES)
    ]  # fmt: skip
    cases += [(MIXTURES[0], BETWEEN)] if world_size == 4 else []
    jobs = [
        make_job(
            checkpoint(name),
            parallel=Parallel(tp_size=tp, pp_size=pp, ep_size=ep, layer_partition=PARTITIONS[pp]),
            max_new_tokens=NEW_TOKENS,
        )
        for name, (tp, pp, ep) in cases
    ]
    spread = [index for index, (name, layout) in enumerate(cases) if name in LATENTS and layout == (2, 1, 2)]
    cases += [cases[index] for index in spread]  # and with rows cut over the tensor-parallel group
    of_spread = [replace(jobs[index].parallel, sp_kind=SPKind.MEGATRON) for index in spread]
    jobs += [replace(jobs[index], parallel=parallel) for index, parallel in zip(spread, of_spread, strict=True)]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for case, job, *ranks in zip(cases, jobs, *reports, strict=True):
        assert job.shape.backend == "own", case
        expected = [generate(checkpoint(case[0]), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        assert found == [expected], f"{case}: {found} instead of {expected}"
        assert len({token for tokens in expected for token in tokens}) > 1  # not one token over and over

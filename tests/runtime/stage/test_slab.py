"""The KV slab is as large as the memory check counts, and requests that share rows do not meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from profiler.comm.ranks.launch import run_ranks
from profiler.model import load_model_shape
from runtime.job.place import Place
from runtime.run.rank import run_jobs
from runtime.stage.slab import KVSlab
from tests.runtime.cases import make_job, make_plan, prompts, requests
from tests.runtime.conftest import Generate
from tuner.plan.kv_rows import assign_rows
from tuner.plan.memory import plan_memory
from tuner.plan.plan import Chunk


@pytest.mark.parametrize(
    ("variant", "tp_size"), [("llama", 1), ("llama", 2), ("llama", 4), ("qwen3", 2), ("DeepseekV3ForCausalLM", 2)]
)
def test_the_slab_is_as_large_as_counted(variant: str, tp_size: int, checkpoint: Callable[[str], Path]) -> None:
    plan = make_plan(checkpoint(variant), tp_size=tp_size, pp_size=2)
    shape = load_model_shape(str(checkpoint(variant)))
    counted = plan_memory(shape, plan, max_new_tokens=3, device_type="cpu")
    for stage in range(2):
        place = Place(stage=stage, sp_rank=0, tp_rank=0, parallel=plan.parallel)
        attentions = [shape.layers[index].attention for index in place.layers]
        slab = KVSlab(
            [(attention.kv_heads.per_rank(tp_size), attention.kept_widths) for attention in attentions],
            assign_rows(plan.requests, plan.rounds, max_new_tokens=3),
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        assert sum(part.nbytes for part in (*slab.keys, *slab.values)) == counted[stage].kv_bytes


def test_tokens_are_the_same_where_requests_share_rows(checkpoint: Callable[[str], Path], generate: Generate) -> None:
    lengths = (90, 40, 45)  # the second and the third take the rows of the first
    rounds = ((Chunk(0, 0, 90),), (Chunk(1, 0, 15), Chunk(2, 0, 30)), (Chunk(1, 15, 25), Chunk(2, 30, 15)))
    asked = requests(*lengths)
    rows = assign_rows(asked, rounds, max_new_tokens=1)
    assert rows.start == (0, 0, 41)
    assert rows.total == 91
    job = make_job(checkpoint("llama"), requests=asked, rounds=rounds, prompts=prompts(*lengths), repeat=2)
    reports = run_ranks(run_jobs, [job], world_size=2, device_type="cpu", num_threads=1)
    (found,) = [ranks[0].token_ids for ranks in reports if ranks[0].token_ids is not None]
    assert list(found) == [generate(checkpoint("llama"), prompt, 1) for prompt in job.prompts]

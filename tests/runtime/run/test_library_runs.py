"""Plans of models that Transformers runs, on real ranks: stages, requests in turn, cached tokens, passes, decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from profiler.comm.ranks.launch import run_ranks
from profiler.hardware.device import describe_hardware
from profiler.model import load_model_shape
from runtime.run.rank import run_jobs
from runtime.run.run import make_job
from tests.library_models import write_model
from tests.runtime.cases import INTERLEAVED, LENGTHS, prompts
from tests.runtime.conftest import Generate
from tuner.plan.plan import Chunk, Parallel, Plan, Request

NEW_TOKENS = 4


def library_plan(folder: Path, **parallel: int) -> Plan:
    """The second request has tokens in its cache before the plan's rounds."""
    cached = (0, 30)
    rounds = (INTERLEAVED[0], (Chunk(1, 30, 30), Chunk(0, 100, 1)), *INTERLEAVED[2:])
    fields: dict[str, Any] = {"tp_size": 1, "pp_size": 3, "layer_partition": (1, 1, 2)} | parallel
    return Plan(
        model=dict(load_model_shape(str(folder), backend="transformers").config) | {"backend": "transformers"},
        precision="float32",
        parallel=Parallel(**fields),
        requests=tuple(
            Request(id=f"r{index}", prompt_tokens=length, cached_tokens=cached[index])
            for index, length in enumerate(LENGTHS)
        ),
        rounds=rounds,
    )


@pytest.mark.timeout(300)
def test_three_stages_give_the_librarys_tokens(tmp_path: Path, generate: Generate) -> None:
    folders = [write_model(tmp_path / name, name) for name in ("GptOssForCausalLM", "NemotronHForCausalLM")]
    asked, hardware = prompts(*LENGTHS), describe_hardware("cpu", num_threads=1)
    jobs = [
        make_job(
            library_plan(folder), hardware, [], weights=folder, prompts=asked, max_new_tokens=NEW_TOKENS, repeat=2,
            device_type="cpu",
        )
        for folder in folders
    ]  # fmt: skip
    reports = run_ranks(run_jobs, jobs, world_size=3, device_type="cpu", num_threads=1)
    for folder, *ranks in zip(folders, *reports, strict=True):
        expected = [generate(folder, prompt, NEW_TOKENS) for prompt in asked]
        assert [list(rank.token_ids) for rank in ranks if rank.token_ids is not None] == [expected], folder.name


def test_what_whole_layers_do_not_take_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "MixtralForCausalLM")
    hardware = describe_hardware("cpu", num_threads=1)
    plan = library_plan(folder, tp_size=2)
    with pytest.raises(UserError, match=r"^tp_size: 2; must be 1: the layers of model are run as wholes"):
        make_job(plan, hardware, [], device_type="cpu", weights=folder)

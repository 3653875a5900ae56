"""Experts on the ranks that share the rows, to which rows are sent: tokens equal those of Transformers in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.comm.ranks.launch import run_ranks
from profiler.model import load_model_shape
from profiler.model.experts import Dispatch
from profiler.sequence.kind import SPKind
from runtime.run.rank import run_jobs
from tests.runtime.cases import PARTITIONS, make_job
from tests.runtime.conftest import Generate
from tuner.plan.plan import Parallel

NEW_TOKENS = 4
MADE = Callable[[str], Path]


def parallel(tp: int, sp: int, kind: SPKind, pp: int = 1) -> Parallel:
    return Parallel(
        tp_size=tp, pp_size=pp, sp_size=sp, sp_kind=kind, ep_size=tp if kind is SPKind.MEGATRON else sp,
        dispatch=Dispatch.ALL_TO_ALL, layer_partition=PARTITIONS[pp],
    )  # fmt: skip


MEGATRON = {size: parallel(size, 1, SPKind.MEGATRON) for size in (2, 4)}
GATHER = {size: parallel(1, size, SPKind.GATHER) for size in (2, 4)}
# What is added to the scores of experts for the choice: all rows go to the first rank's, or none does.
FORCED = {"all": {0: 100.0, 1: 100.0}, "none": dict.fromkeys(range(4), -100.0)}
CASES: dict[int, list[tuple[str, Parallel]]] = {
    2: [
        *((name, layout) for name in ("Qwen2MoeForCausalLM", "all") for layout in (MEGATRON[2], GATHER[2])),
        ("none", GATHER[2]),
        ("GptOssForCausalLM", MEGATRON[2]),
        ("DeepseekV3ForCausalLM", MEGATRON[2]),
        ("MixtralForCausalLM", parallel(1, 2, SPKind.ULYSSES)),
    ],
    4: [
        *(("all", layout) for layout in (MEGATRON[4], GATHER[4])),
        ("none", MEGATRON[4]),
        ("Qwen2MoeForCausalLM", GATHER[4]),
        *((name, parallel(2, 2, SPKind.GATHER)) for name in ("Qwen2MoeForCausalLM", "GptOssForCausalLM")),
        ("Qwen3MoeForCausalLM", parallel(2, 1, SPKind.MEGATRON, pp=2)),
    ],
}


@pytest.fixture(scope="module")
def made(checkpoint: MADE, tmp_path_factory: pytest.TempPathFactory) -> MADE:
    """A checkpoint by its architecture, or GLM's with a router that is forced."""
    folders = dict[str, Path]()

    def make(name: str) -> Path:
        if name not in FORCED:
            return checkpoint(name)
        if name not in folders:
            source, folder = checkpoint("Glm4MoeForCausalLM"), tmp_path_factory.mktemp("forced") / name
            folder.mkdir()
            tensors: dict[str, torch.Tensor] = {}
            for path in source.glob("*.safetensors"):
                tensors |= load_file(path)
            biases = [tensor for key, tensor in tensors.items() if key.endswith("e_score_correction_bias")]
            assert len(biases) == 4
            for bias in biases:
                for expert, added in FORCED[name].items():
                    bias[expert] += added
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.json").write_text((source / "config.json").read_text())
            folders[name] = folder
        return folders[name]

    return make


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", CASES)
def test_tokens_equal(world_size: int, made: MADE, generate: Generate) -> None:
    cases = CASES[world_size]
    jobs = [make_job(made(name), parallel=layout, max_new_tokens=NEW_TOKENS) for name, layout in cases]
    reports = run_ranks(run_jobs, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for (name, layout), job, *ranks in zip(cases, jobs, *reports, strict=True):
        expected = [generate(made(name), prompt, NEW_TOKENS) for prompt in job.prompts]
        found = [list(rank.token_ids) for rank in ranks if rank.token_ids is not None]
        assert found == [expected], f"{name} {layout}: {found} instead of {expected}"
        assert len({token for tokens in expected for token in tokens}) > 1


def test_experts_lie_where_rows_are_shared(checkpoint: MADE) -> None:
    shape = load_model_shape(str(checkpoint("Glm4MoeForCausalLM")))
    mlp = shape.spread(**GATHER[4].spread).layers[1].experts
    assert mlp is not None
    assert mlp.owners == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [mlp.held(0, 1, rank)[0] for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 9)]
    both = shape.spread(**parallel(2, 2, SPKind.GATHER).spread).layers[1].experts
    assert both is not None
    assert both.held(1, 2, 1) == (slice(4, 9), slice(16, 32))  # the second half of the experts' features
    with pytest.raises(UserError, match=r"^dispatch: all-to-all; none, where no ranks share the rows"):
        Parallel(tp_size=2, pp_size=1, ep_size=2, dispatch=Dispatch.ALL_TO_ALL, layer_partition=(5,))
    with pytest.raises(UserError, match=r"^ep_size: 2; 4 with dispatch all-to-all, the ranks that share the rows"):
        Parallel(tp_size=4, pp_size=1, ep_size=2, sp_kind=SPKind.MEGATRON, dispatch=Dispatch.ALL_TO_ALL,
                 layer_partition=(5,))  # fmt: skip

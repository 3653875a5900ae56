"""Gradients of chunked, pipelined, tensor-parallel training are those of the whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from profiler.comm.ranks.launch import run_ranks
from profiler.model import load_model_shape
from runtime.train.data import TokenStream
from runtime.train.rank import TrainJob
from runtime.train.recipe import TrainingRecipe
from tests.runtime.cases import INTERLEAVED, LENGTHS, PARTITIONS, prompts, requests
from tests.runtime.train.workers import gradients
from tuner.plan.plan import Parallel
from tuner.training.order import Order, Recompute

Gradients = Mapping[str, torch.Tensor]
TOKENS = prompts(2000)


def make_job(weights: Path, *, tp_size: int = 1, pp_size: int = 1, **recipe: Any) -> TrainJob:
    return TrainJob(
        shape=load_model_shape(str(weights)), weights=weights,
        parallel=Parallel(tp_size=tp_size, pp_size=pp_size, layer_partition=PARTITIONS[pp_size]),
        requests=requests(*LENGTHS), rounds=INTERLEAVED, recipe=TrainingRecipe(steps=1, **recipe),
        stream=TokenStream.of(TOKENS, requests(*LENGTHS), seed=0), state=weights, resume=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact() -> Callable[[Path, int], Gradients]:
    """Of Transformers in float64, each sequence whole."""
    from transformers import AutoModelForCausalLM

    @cache
    def run(folder: Path, accumulate: int) -> Gradients:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        stream = TokenStream.of(TOKENS, requests(*LENGTHS), seed=0)
        count = accumulate * sum(length - 1 for length in LENGTHS)
        for number in range(accumulate * len(LENGTHS)):
            ids = stream.sequence(number, LENGTHS[number % 2])
            logits = model(ids[None]).logits[0, :-1]
            (torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum") / count).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    return run


# Variant, pp_size, tp_size, recipe.
CASES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("llama", 1, 1, {}),
    ("llama-bias-one-kv-head", 1, 1, {"recompute": Recompute.LAYER}),
    ("llama", 2, 1, {"order": Order.ALL_FORWARD, "accumulate": 2}),
    ("llama", 1, 2, {"recompute": Recompute.LAYER}),
    ("qwen2", 1, 2, {"recompute": Recompute.LINEAR}),
    ("olmo2", 1, 2, {"recompute": Recompute.ROUND}),
    ("llama", 3, 1, {"accumulate": 2, "recompute": Recompute.ROUND}),
    ("qwen2", 3, 1, {}),
    ("llama", 2, 2, {"accumulate": 2}),
    ("phi3", 2, 2, {}),
    ("qwen2", 2, 2, {"recompute": Recompute.LINEAR}),
    ("llama", 3, 2, {}),
    ("qwen3", 3, 2, {"accumulate": 2}),
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_gradients_are_those_of_whole_sequences(
    world_size: int, checkpoint: Callable[[str], Path], exact: Callable[[Path, int], Gradients]
) -> None:
    jobs = [
        make_job(checkpoint(variant), pp_size=pp_size, tp_size=tp_size, **recipe)
        for variant, pp_size, tp_size, recipe in CASES
        if pp_size * tp_size == world_size
    ]
    reports = run_ranks(gradients, jobs, world_size=world_size, device_type="cpu", num_threads=1)
    for job, of_ranks in zip(jobs, zip(*reports, strict=True), strict=True):
        found = {name: tensor for report in of_ranks for name, tensor in report.items()}
        expected = exact(job.weights, job.recipe.accumulate)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = float((found[name] - tensor).norm() / tensor.norm())
            assert error < 1e-5, f"{job.shape.architecture} {job.parallel} {name}: {error}"

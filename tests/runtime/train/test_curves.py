"""Whole trainings: the losses of Transformers' model in torch's own loop, 16-bit formats, and a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiler.comm.ranks.launch import run_ranks
from profiler.model import load_model_shape
from runtime.train.data import TokenStream
from runtime.train.rank import Teacher, TrainJob, TrainReport
from runtime.train.recipe import TrainingRecipe
from tests.checkpoints import write_checkpoint
from tests.runtime.cases import INTERLEAVED, LENGTHS, requests
from tests.runtime.train.workers import curves
from tuner.plan.plan import Parallel

STEPS, SHORT = 50, 15
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.05}
RECIPE = TrainingRecipe(steps=STEPS, learning_rate=3e-3, warmup_steps=5, clip_norm=0.5, weight_decay=0.05)
# A text with something to learn: each token says what comes next, but for every fifth.
TOKENS = (tuple((37 * position // 5 + position % 5) % 211 for position in range(4000)),)
Curve = tuple[TrainReport, dict[str, torch.Tensor]]


def transformers_losses(weights: Path, job: TrainJob) -> list[float]:
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    recipe = job.recipe
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    decay = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps,
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    losses = []
    for step in range(recipe.steps):
        total = torch.zeros(())
        for index, length in enumerate(LENGTHS):
            ids = job.stream.sequence(step * len(LENGTHS) + index, length)[None]
            total = total + model(ids, labels=ids).loss * (length - 1)
        loss = total / job.num_targets
        losses.append(loss.item())
        loss.backward()
        assert recipe.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("trained"), "llama", **SIZES)


@pytest.fixture(scope="module")
def vanishing(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an embedding 65536 times as large: as small are gradients of the residual stream."""
    folder = tmp_path_factory.mktemp("vanishing") / "model"
    folder.mkdir()
    for path in weights.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in tensors:
                if "embed" in name:
                    tensors[name] *= 65536.0
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def make_job(weights: Path, recipe: TrainingRecipe) -> TrainJob:
    return TrainJob(
        shape=load_model_shape(str(weights)), weights=weights,
        parallel=Parallel(tp_size=1, pp_size=2, layer_partition=(1, 1)), requests=requests(*LENGTHS),
        rounds=INTERLEAVED, recipe=recipe, stream=TokenStream.of(TOKENS, requests(*LENGTHS), seed=0), state=weights,
        resume=None, saves=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(weights: Path, vanishing: Path) -> dict[str, list[Curve]]:
    """All trainings of this module, on one launch of two stages: name -> of each rank."""
    short = replace(RECIPE, steps=4, warmup_steps=0, weight_decay=0.0)
    student = make_job(weights, replace(short, temperature=2.0))
    jobs = {
        "float32": make_job(weights, RECIPE),
        "bfloat16": replace(make_job(weights, replace(RECIPE, precision="bfloat16")), until_step=SHORT),
        "float16": replace(make_job(weights, replace(RECIPE, precision="float16")), until_step=SHORT),
        "vanishing": make_job(vanishing, replace(short, precision="float16", loss_scale=1.0)),
        "scaled": make_job(vanishing, replace(short, precision="float16")),
        "w8a8": replace(make_job(weights, replace(RECIPE, precision="w8a8+float32")), until_step=SHORT),
        "own teacher": replace(student, teacher=Teacher(
            shape=student.shape, weights=weights, parallel=student.parallel)),
    }  # fmt: skip
    reports = run_ranks(curves, list(jobs.values()), world_size=2, device_type="cpu", num_threads=1)
    return {name: [of_rank[index] for of_rank in reports] for index, name in enumerate(jobs)}


def losses(curve: list[Curve]) -> torch.Tensor:
    return torch.tensor([record.loss for record in curve[0][0].records])


def test_losses_are_those_of_transformers(weights: Path, trained: dict[str, list[Curve]]) -> None:
    expected = torch.tensor(transformers_losses(weights, make_job(weights, RECIPE)))
    assert expected[-1] < 0.8 * expected[0]
    assert torch.allclose(losses(trained["float32"]), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "w8a8"])
def test_shorter_formats_follow_the_curve(precision: str, trained: dict[str, list[Curve]]) -> None:
    exact, found = losses(trained["float32"])[:SHORT], losses(trained[precision])
    assert not torch.equal(exact, found)
    assert (found - exact).abs().max() < 0.02 * exact[0]


def test_float16_needs_a_scaled_loss(vanishing: Path, trained: dict[str, list[Curve]]) -> None:
    """Without one the gradients of the layers' norms vanish: not one number of them is learned."""

    def moved(name: str) -> dict[str, bool]:
        start = load_start(vanishing)
        found = {key: value for _, masters in trained[name] for key, value in masters.items()}
        return {key: not torch.equal(found[key], start[key]) for key in start}

    assert not any(moved("vanishing").values())
    assert all(moved("scaled").values())
    assert all(record.norm < 1e3 for record in trained["scaled"][0][0].records if not record.is_skipped)


def load_start(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if "layernorm" in name}


def test_a_model_learns_nothing_from_itself(trained: dict[str, list[Curve]]) -> None:
    """It agrees with its teacher from the start; AdamW turns what rounding leaves into steps, which stay small."""
    records = trained["own teacher"][0][0].records
    assert abs(records[0].loss) < 1e-6
    assert records[0].norm < 1e-5
    assert records[0].cross_entropy > 3.0


def test_a_sequence_is_seen_once_a_pass() -> None:
    stream = TokenStream.of((tuple(range(100)),), requests(10), seed=3)
    passes = [[stream.sequence(number, 10).tolist() for number in range(first, first + 9)] for first in (0, 9)]
    for windows in passes:
        seen = [token for window in windows for token in window]
        assert len(set(seen)) == 90
        assert all(window == list(range(window[0], window[0] + 10)) for window in windows)
    assert passes[0] != passes[1]

"""The chain that benchmarks of smaller models share: a trained model, pruned, recovered and judged."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.trained_model import CPU, SMALL, Training, plan_of, texts, trained
from profiler.model import load_model_shape
from runtime.prune.importance import Measure
from runtime.prune.prices import ChunkWork
from runtime.prune.prune import Wanted, prune_checkpoint
from runtime.train.recipe import TrainingRecipe
from runtime.train.train import train

RECOVERY = 0.05  # of the training's tokens
CUTS: Mapping[str, Wanted] = {  # what goes, by name
    "25 % of FFN": Wanted(channels=0.25),
    "50 % of FFN": Wanted(channels=0.5),
    f"1 of {SMALL.layers} layers": Wanted(layers=1 / SMALL.layers),
    f"2 of {SMALL.layers} layers": Wanted(layers=2 / SMALL.layers),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One trained model, and where its smaller ones go."""

    folder: Path
    model: Path
    seed: int
    training: Training

    @classmethod
    def of(cls, options: argparse.Namespace, seed: int) -> Study:
        """With a model that is trained unless it is there; its smaller ones are kept beside it."""
        training = Training.of(options)
        options.folder.mkdir(parents=True, exist_ok=True)
        model = trained(options.folder, seed, training)
        folder = model.with_name(f"{model.name}-smaller")
        folder.mkdir(exist_ok=True)
        return cls(folder=folder, model=model, seed=seed, training=training)

    def cut(self, name: str, measure: Measure = Measure.ACTIVATION) -> Path:
        """Prune by a measure."""
        output = self.folder / f"{name} by {measure}".replace(" %", "").replace(" ", "-")
        if output.exists():
            return output
        prune_checkpoint(
            self.model, output, load_model_shape(str(self.model)), CUTS[name], measure=measure,
            calibration=texts().calibration, work=ChunkWork(chunk=512, context=0, dtype=torch.float32, device=CPU),
            seed=self.seed, measures_speed=False,
        )  # fmt: skip
        return output

    def recover(self, pruned: Path, *, rounds_as: str | None = None) -> Path:
        """Distil the unpruned model into it, with a share of the training's tokens; products may round as a
        precision's."""
        steps = max(1, round(RECOVERY * self.training.steps))
        plain = self.training.precision
        precision = f"{rounds_as}+{plain}" if rounds_as else plain
        recipe = TrainingRecipe(
            steps=steps, learning_rate=2e-3, warmup_steps=steps // 10, seed=self.seed + 100, save_every=steps,
            precision=precision,
        )  # fmt: skip
        output = pruned.with_name(f"{pruned.name}-recovered-{precision}".replace("+", "-"))
        if output.exists():
            return output
        train(
            plan_of(pruned), recipe, weights=pruned, sequences=[texts().learned], output=output, teacher=self.model,
            device_type=self.training.device_type, num_threads=1,
        )  # fmt: skip
        shutil.rmtree(output.with_name(f"{output.name}.state"))
        return output


def loss_percent(perplexity: float, before: float) -> float:
    """Rise of perplexity."""
    return 100.0 * (perplexity / before - 1.0)

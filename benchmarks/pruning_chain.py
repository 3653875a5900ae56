"""The chain that benchmarks of smaller models share: a trained model, pruned, recovered and judged."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.trained_model import CPU, SMALL, plan_of, texts, trained
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
FOLDER = Path("demo-out/smaller")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One trained model, and where its smaller ones go."""

    folder: Path
    model: Path
    seed: int
    steps: int

    @classmethod
    def of(cls, options: argparse.Namespace, folder: Path, seed: int) -> Study:
        """With a model that is trained unless it is there; smaller ones go to `folder`."""
        for each in (options.folder, folder):
            each.mkdir(parents=True, exist_ok=True)
        model = trained(options.folder, seed, options.steps)
        return cls(folder=folder, model=model, seed=seed, steps=options.steps)

    def cut(self, name: str, measure: Measure = Measure.ACTIVATION) -> Path:
        """Prune by a measure."""
        output = self.folder / f"{name} by {measure}".replace(" %", "").replace(" ", "-")
        prune_checkpoint(
            self.model, output, load_model_shape(str(self.model)), CUTS[name], measure=measure,
            calibration=texts().calibration, work=ChunkWork(chunk=512, context=0, dtype=torch.float32, device=CPU),
            seed=self.seed, measures_speed=False,
        )  # fmt: skip
        return output

    def recover(self, pruned: Path, *, precision: str = "float32") -> Path:
        """Distil the unpruned model into it, with a share of the training's tokens."""
        steps = max(1, round(RECOVERY * self.steps))
        recipe = TrainingRecipe(
            steps=steps, learning_rate=2e-3, warmup_steps=steps // 10, seed=self.seed + 100, save_every=steps,
            precision=precision,
        )  # fmt: skip
        output = pruned.with_name(f"{pruned.name}-recovered-{precision}".replace("+", "-"))
        train(
            plan_of(pruned), recipe, weights=pruned, sequences=[texts().learned], output=output, teacher=self.model,
            num_threads=1,
        )  # fmt: skip
        shutil.rmtree(output.with_name(f"{output.name}.state"))
        return output


def loss_percent(perplexity: float, before: float) -> float:
    """Rise of perplexity."""
    return 100.0 * (perplexity / before - 1.0)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that these benchmarks share. One thread: on busy cores threads wait longer than they work."""
    torch.set_num_threads(1)
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--steps", type=int, default=400, help="of the training")
    made.add_argument("--folder", type=Path, default=FOLDER, help="where trained models are kept")
    made.add_argument("--output", type=Path)
    return made

"""What pruning loses by each measure of importance, and what a short distillation wins back, over several seeds.

    python -m benchmarks.pruning_study [--steps 400] [--seeds 3] [--folder DIR] [--output FILE]

Models of `benchmarks.trained_model`, one a seed. Each is pruned by every measure; what activations chose is recovered
with 5 % of the training's tokens, the unpruned model as its teacher.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.trained_model import CPU, HELD_OUT, SMALL, judge, plan_of, texts, trained
from db.files.documents import write_json
from profiler.model import load_model_shape
from runtime.prune.importance import Measure
from runtime.prune.prices import Work
from runtime.prune.prune import Wanted, prune_checkpoint
from runtime.train.recipe import Recipe
from runtime.train.train import train
from service.cli.output import print_table

RECOVERY = 0.05  # of the training's tokens
# What goes.
CUTS: Mapping[str, Wanted] = {
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

    def cut(self, name: str, measure: Measure = Measure.ACTIVATION) -> Path:
        """Prune by a measure."""
        output = self.folder / f"{name} by {measure}".replace(" %", "").replace(" ", "-")
        prune_checkpoint(
            self.model, output, load_model_shape(str(self.model)), CUTS[name], measure=measure,
            calibration=texts().calibration, work=Work(chunk=512, context=0, dtype=torch.float32, device=CPU),
            seed=self.seed, measures_speed=False,
        )  # fmt: skip
        return output

    def recover(self, pruned: Path, *, precision: str = "float32") -> Path:
        """Distil the unpruned model into it, with a share of the training's tokens."""
        steps = max(1, round(RECOVERY * self.steps))
        recipe = Recipe(
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


def rows_of(studies: Sequence[Study]) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Of each cut: rises of perplexity in percent by each measure and after recovery by seed; all perplexities."""
    rows, found = [], dict[str, Any]()
    befores = [judge(study.model) for study in studies]
    for name in CUTS:
        by_measure: dict[str, list[float]] = {measure: [] for measure in Measure}
        recovered = []
        for study in studies:
            for measure in Measure:
                pruned = study.cut(name, measure)
                by_measure[measure].append(judge(pruned))
                if measure is Measure.ACTIVATION:
                    recovered.append(judge(study.recover(pruned)))
        found[name] = {"before": befores, **by_measure, "recovered": recovered}
        first, *others = (by_measure[measure] for measure in Measure)
        best = sum(one <= min(rest) for one, *rest in zip(first, *others, strict=True))
        rises = (_rises(values, befores) for values in (*by_measure.values(), recovered))
        rows.append((name, *rises, f"{best} of {len(studies)}"))
        print(f"{name}: {found[name]}", flush=True)
    return rows, found


def _rises(values: Sequence[float], befores: Sequence[float]) -> str:
    return "  ".join(f"{100.0 * (after / before - 1.0):+.1f}" for after, before in zip(values, befores, strict=True))


def main() -> None:
    """Train what is not there, prune, recover, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where trained models are kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on busy cores threads wait for one another longer than they work
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        studies = []
        for seed in range(options.seeds):
            model = trained(options.folder, seed, options.steps)
            (folder := Path(place) / str(seed)).mkdir()
            studies.append(Study(folder=folder, model=model, seed=seed, steps=options.steps))
            print(f"seed {seed}: trained, {time.monotonic() - started:.0f} s", flush=True)
        rows, found = rows_of(studies)
    columns = ("removed", *Measure, "recovered", "activation best")
    tokens = options.steps * SMALL.sequence * SMALL.batch
    title = f"rise of perplexity on {HELD_OUT} characters in %, by seed; models of {tokens} tokens"
    print_table(columns, rows, title=title)
    print(f"{time.monotonic() - started:.0f} s")
    if options.output:
        write_json(options.output, found)


if __name__ == "__main__":
    main()

"""A small model trained, pruned, recovered, quantized, planned and run in one go: what each step costs and gains.

    python -m benchmarks.smaller_model [--steps 600] [--seeds 3] [--profile-seconds 240] [--output FILE]

A byte-level Llama learns Python's library, on the project's own training. It is pruned by every kind of unit and by
every measure of importance, for each seed; what activations chose is recovered with 5 % of the training's tokens, the
unpruned model as its teacher. One of them is then quantized, profiled, planned and run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured_plans import Case, Machine
from benchmarks.quantized_perplexity import FIRST, LAST, library_text, pieces
from db.files.documents import write_json
from profiler.model import PRECISIONS, load_model_shape
from runtime.prune.importance import Measure
from runtime.prune.prices import Work
from runtime.prune.prune import Wanted, prune_checkpoint
from runtime.quantize.layers import perplexity
from runtime.quantize.quantize import quantize_checkpoint
from runtime.quantize.recipe import Recipe as QuantizeRecipe
from runtime.train.recipe import Recipe
from runtime.train.train import train
from service.cli.output import print_table
from tuner.plan.plan import Chunk, Parallel, Plan, Request

SEQUENCE, BATCH, HELD_OUT, CALIBRATION = 128, 16, 20_000, 8_000
RECOVERY = 0.05
CPU = torch.device("cpu")
# What goes: name -> shares.
CUTS: dict[str, dict[str, Any]] = {
    "FFN 25 %": {"channels": 0.25},
    "FFN 50 %": {"channels": 0.5},
    "1 of 4 layers": {"layers": 0.25},
}
TokenIds = tuple[int, ...]


def begin(folder: Path, seed: int) -> Path:
    """A model as Transformers initialises it."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=LAST - FIRST + 1, max_position_embeddings=4096, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plan_of(folder: Path) -> Plan:
    """A step of `BATCH` sequences in one round, on one rank."""
    shape = load_model_shape(str(folder))
    return Plan(
        model=dict(shape.config), precision="float32",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,)),
        requests=tuple(Request(id=f"r{index}", prompt_tokens=SEQUENCE) for index in range(BATCH)),
        rounds=(tuple(Chunk(index, 0, SEQUENCE) for index in range(BATCH)),),
    )  # fmt: skip


def learn(source: Path, output: Path, texts: Sequence[TokenIds], recipe: Recipe, teacher: Path | None = None) -> Path:
    """Train a checkpoint."""
    train(plan_of(source), recipe, weights=source, sequences=texts, output=output, teacher=teacher, num_threads=1)
    return output


class Study:
    """All of it for one seed."""

    def __init__(self, folder: Path, seed: int, steps: int, ids: TokenIds) -> None:
        self.folder, self.seed, self.steps = folder, seed, steps
        self.held_out = pieces(list(ids[-HELD_OUT:]))
        self.texts = [tuple(ids[:-HELD_OUT])]
        self.calibration = pieces(list(ids[100_000:][:CALIBRATION]))
        recipe = Recipe(steps=steps, learning_rate=3e-3, warmup_steps=steps // 12, seed=seed, save_every=steps)
        self.trained = learn(begin(folder / "begun", seed), folder / "trained", self.texts, recipe)
        self.before = self.judge(self.trained)

    def judge(self, folder: Path) -> float:
        """Perplexity on the held-out text."""
        return perplexity(folder, load_model_shape(str(folder)), self.held_out, CPU)

    def cut(self, name: str, measure: Measure) -> Path:
        """Prune by a measure."""
        output = self.folder / f"{name}-{measure}".replace(" ", "").replace("%", "")
        prune_checkpoint(
            self.trained, output, load_model_shape(str(self.trained)), Wanted(**CUTS[name]), measure=measure,
            calibration=self.calibration, work=Work(chunk=512, context=0, dtype=torch.float32, device=CPU),
            seed=self.seed, measures_speed=False,
        )  # fmt: skip
        return output

    def recover(self, pruned: Path, *, precision: str = "float32") -> Path:
        """Distil the unpruned model into it, with a share of the training's tokens."""
        steps = max(1, round(RECOVERY * self.steps))
        recipe = Recipe(
            steps=steps, learning_rate=2e-3, warmup_steps=steps // 10, seed=self.seed + 100,
            save_every=steps, precision=precision,
        )  # fmt: skip
        output = pruned.with_name(f"{pruned.name}-recovered-{precision}".replace("+", "-"))
        return learn(pruned, output, self.texts, recipe, teacher=self.trained)


def study_rows(studies: Sequence[Study]) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Medians over seeds of each cut: perplexity by each measure, and after recovery."""
    rows, found = [], dict[str, Any]()
    for name in CUTS:
        of_measure: dict[str, list[float]] = {}
        recovered = []
        for study in studies:
            for measure in Measure:
                pruned = study.cut(name, measure)
                of_measure.setdefault(measure, []).append(study.judge(pruned))
                if measure is Measure.ACTIVATION:
                    recovered.append(study.judge(study.recover(pruned)))
        befores = [study.before for study in studies]
        losses = [100.0 * (after / before - 1.0) for after, before in zip(recovered, befores, strict=True)]
        found[name] = {"before": befores, "recovered": recovered, "loss_percent": losses, **of_measure}
        beaten = sum(
            one < min(rest)
            for one, *rest in zip(*(of_measure[measure] for measure in Measure), strict=True)
        )  # fmt: skip
        medians = [statistics.median(of_measure[measure]) for measure in Measure]
        rows.append((name, statistics.median(befores), *medians, f"{beaten} of {len(studies)}",
                     statistics.median(recovered), statistics.median(losses), max(losses)))  # fmt: skip
    return rows, found


def chain_rows(study: Study, profile_s: float) -> list[tuple[Any, ...]]:
    """Each step's model: perplexity, size, and a prompt's time predicted and measured on one rank."""
    pruned = study.cut("FFN 50 %", Measure.ACTIVATION) if not (study.folder / "FFN50-activation").exists() else (
        study.folder / "FFN50-activation")  # fmt: skip
    recovered = study.recover(pruned) if not (found := recovered_of(pruned)).exists() else found
    aware = study.recover(pruned, precision="w8a8+float32")
    steps: list[tuple[str, Path, str]] = [
        ("trained", study.trained, "float32"), ("pruned", pruned, "float32"), ("recovered", recovered, "float32"),
    ]  # fmt: skip
    precision = PRECISIONS["w8a8+float32"]
    assert precision.linears is not None
    rows = []
    for name, source in (("quantized", recovered), ("recovered for W8A8, quantized", aware)):
        output = study.folder / name.replace(" ", "-").replace(",", "")
        quantize_checkpoint(
            source, output, load_model_shape(str(source)), precision, QuantizeRecipe(linears=precision.linears),
            calibration=study.calibration, device=CPU,
        )  # fmt: skip
        steps.append((name, output, "w8a8+float32"))
    for name, folder, dtype in steps:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
        ppl = study.judge(folder) if dtype == "float32" else quantized_perplexity(folder, study.held_out)
        machine = Machine(
            str(folder), database_url=f"sqlite:///{study.folder / 'profile.db'}", context_length=2048,
            budget_s=profile_s, dtype=dtype,
        )  # fmt: skip
        plan = machine.plan(Case(tp_size=1, pp_size=2, prompt_lens=(2048,)))
        result = machine.run(plan, repeat=3)
        predicted = plan.predicted.makespan_s if plan.predicted else None
        rows.append((name, ppl, size, 1e3 * predicted if predicted else None, 1e3 * result.makespan_s,
                     2048 / result.makespan_s))  # fmt: skip
    return rows


def recovered_of(pruned: Path) -> Path:
    """Where a recovered model lies."""
    return pruned.with_name(f"{pruned.name}-recovered-float32")


def quantized_perplexity(folder: Path, sequences: Sequence[TokenIds]) -> float:
    """Of a quantized checkpoint, in Transformers, which dequantizes its weights and not its activations."""
    from runtime.run.reference import load_reference

    model = load_reference(folder, PRECISIONS["w8a8+float32"])
    losses = []
    with torch.inference_mode():
        for ids in sequences:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    """Run the study and the chain, print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profile-seconds", type=float, default=240.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ids = tuple(library_text())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        studies = []
        for seed in range(options.seeds):
            folder = Path(place) / f"seed-{seed}"
            folder.mkdir()
            studies.append(Study(folder, seed, options.steps, ids))
            print(f"seed {seed}: trained to {studies[-1].before:.4f} in {time.monotonic() - started:.0f} s", flush=True)
        rows, found = study_rows(studies)
        columns = ("removed", "unpruned", *Measure, "activation best", "recovered", "loss %", "worst loss %")
        tokens = options.steps * SEQUENCE * BATCH
        print_table(columns, rows, title=f"perplexity on {HELD_OUT} characters, {tokens} tokens, {options.seeds} seeds")
        if options.output:
            write_json(options.output, found)
        chain = chain_rows(studies[0], options.profile_seconds)
        columns = ("step", "perplexity", "MiB", "predicted TTFT ms", "measured ms", "tokens/s")
        print_table(columns, chain, title="the chain, FFN 50 %: a prompt of 2048 on two ranks of one thread")


if __name__ == "__main__":
    main()

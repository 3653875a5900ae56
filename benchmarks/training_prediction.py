"""Training steps that were never run, predicted from a profile and then measured on this machine's CPU.

    python -m benchmarks.training_prediction [--profile-seconds 90] [--folder DIR]

A Llama of four layers with random weights; ranks of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from db.files.documents import write_json
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.model import load_model_shape, model_from_config
from profiler.model.shape import ModelShape
from runtime.run.prompts import random_prompts
from runtime.train.recipe import TrainingRecipe
from runtime.train.train import train
from service.cli.output import print_table
from service.use_cases.checkpoints.step_prediction import predict
from tuner.plan.layout import layout_of
from tuner.plan.plan import Chunk, Parallel, Plan, Request, Round
from tuner.training.order import Order, Recompute

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192}  # fmt: skip
LENGTH, STEPS = 1024, 4
ONE, TWO = Parallel(tp_size=1, pp_size=1, layer_partition=(4,)), Parallel(tp_size=1, pp_size=2, layer_partition=(2, 2))
SPLIT = Parallel(tp_size=2, pp_size=1, layer_partition=(4,))
# Layout, sequences, chunks of each, order, recomputation.
CASES: Sequence[tuple[Parallel, int, int, Order, Recompute]] = (
    (ONE, 1, 1, Order.ONE_EACH, Recompute.NONE),
    (ONE, 1, 4, Order.ONE_EACH, Recompute.NONE),
    (ONE, 2, 2, Order.ONE_EACH, Recompute.LINEAR),
    (ONE, 1, 2, Order.ONE_EACH, Recompute.LAYER),
    (TWO, 1, 4, Order.ONE_EACH, Recompute.NONE),
    (TWO, 2, 4, Order.ONE_EACH, Recompute.NONE),
    (TWO, 2, 4, Order.ALL_FORWARD, Recompute.NONE),
    (TWO, 3, 2, Order.ONE_EACH, Recompute.ROUND),
    (SPLIT, 1, 1, Order.ONE_EACH, Recompute.NONE),
    (SPLIT, 2, 2, Order.ONE_EACH, Recompute.LINEAR),
)


def plan_of(shape: ModelShape, parallel: Parallel, sequences: int, chunks: int) -> Plan:
    """Sequences one after another, each in equal chunks."""
    size = LENGTH // chunks
    rounds: list[Round] = [
        (Chunk(index, start, size),) for index in range(sequences) for start in range(0, LENGTH, size)
    ]
    return Plan(
        model=dict(shape.config), precision="float32", parallel=parallel,
        requests=tuple(Request(id=f"r{index}", prompt_tokens=LENGTH) for index in range(sequences)),
        rounds=tuple(rounds),
    )  # fmt: skip


def measure(shape: ModelShape, url: str) -> list[tuple[Any, ...]]:
    """A row a case."""
    rows = []
    texts = random_prompts((Request(id="all", prompt_tokens=20_000),), shape.vocab_size)
    for parallel, sequences, chunks, order, recompute in CASES:
        plan = plan_of(shape, parallel, sequences, chunks)
        recipe = TrainingRecipe(steps=STEPS, order=order, recompute=recompute)
        step = predict(plan, recipe, shape, device_type="cpu", num_threads=1, db_url=url).step
        assert step is not None
        result = train(plan, recipe, weights=None, sequences=texts, output=None, num_threads=1)
        seconds = result.seconds_a_step
        rows.append((
            str(layout_of(parallel)), sequences, chunks, order, recompute, step.seconds, seconds,
            100.0 * (step.seconds / seconds - 1.0), 100.0 * step.gap, result.tokens_a_s,
        ))  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Profile, predict, train, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile-seconds", type=float, default=90.0)
    parser.add_argument("--folder", type=Path, help="where the profile is kept")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder: Path = options.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        shape = model_from_config(dict(load_model_shape("llama-3.2-1b").config) | SIZES, name="small")
        write_json(folder / "config.json", dict(shape.config))
        url = f"sqlite:///{(folder / 'isochunk.db').resolve()}"
        profile_model(ProfileOptions(
            model=str(folder), world_size=2, tp_sizes="1,2", context_length=LENGTH, dtype="float32",
            device_type="cpu", threads_per_rank=1, budget_s=options.profile_seconds, db_url=url,
        ))  # fmt: skip
        rows = measure(shape, url)
    columns = ("layout", "sequences", "chunks", "order", "recompute", "predicted s", "measured s", "off %", "gap %",
               "tokens/s")  # fmt: skip
    off = statistics.median(abs(row[7]) for row in rows)
    print_table(columns, rows, title=f"steps of sequences of {LENGTH} tokens; off by {off:.1f} % in the median")
    if options.output:
        write_json(options.output, {"columns": columns, "rows": rows})


if __name__ == "__main__":
    main()

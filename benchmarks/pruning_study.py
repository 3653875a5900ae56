"""What pruning loses by each measure of importance, and what a short distillation wins back, over several seeds.

    python -m benchmarks.pruning_study [--steps 400] [--seeds 3] [--device cuda] [--folder DIR] [--output FILE]

Models of `benchmarks.trained_model`, one a seed. Each is pruned by every measure; what activations chose is recovered
with 5 % of the training's tokens, the unpruned model as its teacher.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pruning_chain import CUTS, Study, loss_percent
from benchmarks.trained_model import HELD_OUT, SMALL, judge, parser
from db.files.documents import write_json
from runtime.prune.importance import Measure
from service.cli.output import print_table


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
    return "  ".join(f"{loss_percent(after, before):+.1f}" for after, before in zip(values, befores, strict=True))


def main() -> None:
    """Train what is not there, prune, recover, print."""
    options_of = parser(__doc__, steps=400)
    options_of.add_argument("--seeds", type=int, default=3)
    options_of.add_argument("--output", type=Path)
    options = options_of.parse_args()
    started = time.monotonic()
    studies = []
    for seed in range(options.seeds):
        studies.append(Study.of(options, seed))
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

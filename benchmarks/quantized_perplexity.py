"""Perplexity of a small trained model in every precision, with outliers and without: a Llama learns Python's library.

    python -m benchmarks.quantized_perplexity [--steps 800] [--folder DIR]

The model is one of `benchmarks.trained_model`, kept in DIR. Outliers come from an exact rescaling: two channels of each
layer's norms are 40 times as wide, and the columns behind them as much smaller; the function is the same.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.trained_model import CALIBRATION, CPU, FIRST, LAST, Training, parser, pieces, texts, trained
from profiler.kernels.quantized.weight import Observer
from profiler.model import PRECISIONS, load_model_shape
from profiler.model.precision import E4M3, INT8
from runtime.quantize.quantize import quantize_checkpoint
from runtime.quantize.recipe import QuantizationRecipe
from service.cli.output import print_table

OUTLIERS, FACTOR = (5, 77), 40.0
# Precision, recipe, characters to calibrate on.
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("w8a16", {}, CALIBRATION),
    ("w8a8", {}, CALIBRATION),
    ("w8a8", {"smooth": 0.5}, CALIBRATION),
    ("w8a8-static", {}, CALIBRATION),
    ("w8a8-static", {"asymmetric": True}, CALIBRATION),
    ("w8a8-static", {"observer": Observer.PERCENTILE}, CALIBRATION),
    ("w8a8-static", {"observer": Observer.MSE}, CALIBRATION),
    ("w8a8-static", {"smooth": 0.5}, CALIBRATION),
    ("w8a8-static", {"smooth": 0.5}, 70),
    ("fp8", {}, CALIBRATION),
    ("fp8-static", {}, CALIBRATION),
    ("w8a8", {"kv": E4M3}, CALIBRATION),
    ("w8a8", {"kv": INT8}, CALIBRATION),
)
ORDER = 6
SAMPLES = 5  # of calibration texts, apart from one another


def ngram_perplexity(learned: Sequence[int], held_out: Sequence[int], order: int) -> float:
    """Of a model of the last `order` characters, whose counts are mixed as Witten and Bell (1991) do."""
    counts = [Counter[tuple[int, ...]]() for _ in range(order)]
    for length, count in enumerate(counts):
        count.update(zip(*(learned[first:] for first in range(length + 1)), strict=False))
    totals = [Counter[tuple[int, ...]]() for _ in counts]
    kinds = [Counter[tuple[int, ...]]() for _ in counts]
    for count, total, kind in zip(counts, totals, kinds, strict=True):
        for gram, times in count.items():
            total[gram[:-1]] += times
            kind[gram[:-1]] += 1
    nats = 0.0
    for place, token in enumerate(held_out):
        chance = 1.0 / (LAST - FIRST + 1)
        for length in range(min(order, place + 1)):
            before = tuple(held_out[place - length : place])
            if before not in totals[length]:
                break
            new = kinds[length][before]
            chance = (counts[length][(*before, token)] + new * chance) / (totals[length][before] + new)
        nats -= math.log(chance)
    return math.exp(nats / len(held_out))


def with_outliers(source: Path, folder: Path) -> None:
    """The same function with two wide channels in each norm before products."""
    shutil.copytree(source, folder)
    channels = list(OUTLIERS)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[channels] *= FACTOR
            elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                tensor[:, channels] /= FACTOR
        save_file(tensors, path, metadata={"format": "pt"})


def perplexity(
    source: Path, folder: Path, name: str, recipe: dict[str, Any], calibration: Sequence[int], held_out: Sequence[int]
) -> tuple[float, float]:
    """Before and after quantizing in one way."""
    precision = PRECISIONS[name]
    assert precision.linears is not None
    report = quantize_checkpoint(
        source, folder, load_model_shape(str(source)), precision,
        QuantizationRecipe(linears=precision.linears, **recipe),
        calibration=pieces(calibration), held_out=pieces(held_out), device=CPU,
    )  # fmt: skip
    assert report.perplexity_before is not None and report.perplexity_after is not None
    return report.perplexity_before, report.perplexity_after


def _is_calibrated(name: str, recipe: dict[str, Any]) -> bool:
    """Whether what comes out depends on the calibration texts."""
    linears = PRECISIONS[name].linears
    return (linears is not None and linears.is_calibrated) or bool(recipe.keys() & {"smooth", "kv"})


def main() -> None:
    """Train, quantize in every way, print perplexities."""
    options = parser(__doc__, steps=800).parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    plain = trained(options.folder, 0, Training.of(options))
    learned, held_out = texts().learned, list(chain.from_iterable(texts().held_out))
    rows = []
    with TemporaryDirectory() as place:
        wide = Path(place) / "outliers"
        with_outliers(plain, wide)
        for kind, source in (("trained", plain), ("outliers", wide)):
            for number, (name, recipe, characters) in enumerate(CASES):
                found = [
                    perplexity(source, Path(place) / f"{kind}-{number}-{sample}", name, recipe,
                               learned[100_000 + sample * CALIBRATION :][:characters], held_out)
                    for sample in range(SAMPLES if _is_calibrated(name, recipe) else 1)
                ]  # fmt: skip
                settings = ", ".join(f"{key} {getattr(value, 'name', value)}" for key, value in recipe.items())
                losses = [100.0 * (after / before - 1.0) for before, after in found]
                rows.append((kind, name, settings, characters, len(losses), found[0][0],
                             statistics.median(losses), min(losses), max(losses)))  # fmt: skip
                print(*rows[-1], flush=True)
    columns = ("model", "precision", "recipe", "calibrated on", "samples", "before", "loss %", "least %", "most %")
    print_table(columns, rows, title=f"perplexity on {len(held_out)} characters after {options.steps} steps")
    print(f"a model of the last {ORDER} characters: {ngram_perplexity(learned, held_out, ORDER):.2f}")


if __name__ == "__main__":
    main()

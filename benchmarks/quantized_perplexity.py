"""Perplexity of a small trained model in every precision, with outliers and without: a Llama learns Python's library.

    python -m benchmarks.quantized_perplexity [--seconds 200] [--held-out-characters 20000]

Characters are the tokens. Outliers come from an exact rescaling: two channels of each layer's norms are 40 times as
wide, and the columns behind them as much smaller; the function is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from profiler.model import PRECISIONS, load_model_shape
from profiler.model.precision import E4M3, INT8
from runtime.quantize.quantize import quantize_checkpoint
from runtime.quantize.recipe import Recipe
from service.cli.output import print_table

FIRST, LAST, SEQUENCE, BATCH, CALIBRATION = 32, 126, 128, 16, 8000
OUTLIERS, FACTOR = (5, 77), 40.0
# Precision, recipe, characters to calibrate on.
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("w8a16", {}, CALIBRATION),
    ("w8a8", {}, CALIBRATION),
    ("w8a8", {"smooth": 0.5}, CALIBRATION),
    ("w8a8-static", {}, CALIBRATION),
    ("w8a8-static", {"asymmetric": True}, CALIBRATION),
    ("w8a8-static", {"smooth": 0.5}, CALIBRATION),
    ("w8a8-static", {"smooth": 0.5}, 70),
    ("fp8", {}, CALIBRATION),
    ("fp8-static", {}, CALIBRATION),
    ("w8a8", {"kv": E4M3}, CALIBRATION),
    ("w8a8", {"kv": INT8}, CALIBRATION),
)
SAMPLES = 5  # of calibration texts, apart from one another


def library_text() -> list[int]:
    """Token ids of the modules of Python's library, in the order of their names."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return [code - FIRST for code in map(ord, text) if FIRST <= code <= LAST]


def train(folder: Path, ids: torch.Tensor, seconds: float) -> float:
    """Train for so long, write the checkpoint, and return the last loss."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=LAST - FIRST + 1, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    started, step, loss = time.monotonic(), 0, torch.zeros(())
    while (passed := (time.monotonic() - started) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1.0 - passed)
        starts = torch.randint(0, len(ids) - SEQUENCE, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + SEQUENCE] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    model.save_pretrained(folder)
    return loss.item()


def with_outliers(source: Path, folder: Path) -> None:
    """The same function with two wide channels in each norm before products."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors, channels = load_file(source / "model.safetensors"), list(OUTLIERS)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[channels] *= FACTOR
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, channels] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pieces(ids: list[int], length: int = 512) -> list[tuple[int, ...]]:
    """Sequences of at most so many tokens."""
    return [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]


def perplexity(
    source: Path, folder: Path, name: str, recipe: dict[str, Any], calibration: list[int], held_out: list[int]
) -> tuple[float, float]:
    """Before and after quantizing in one way."""
    precision = PRECISIONS[name]
    assert precision.linears is not None
    report = quantize_checkpoint(
        source, folder, load_model_shape(str(source)), precision, Recipe(linears=precision.linears, **recipe),
        calibration=pieces(calibration), held_out=pieces(held_out), device=torch.device("cpu"),
    )  # fmt: skip
    assert report.perplexity_before is not None and report.perplexity_after is not None
    return report.perplexity_before, report.perplexity_after


def _is_calibrated(name: str, recipe: dict[str, Any]) -> bool:
    """Whether what comes out depends on the calibration texts."""
    linears = PRECISIONS[name].linears
    return (linears is not None and linears.is_calibrated) or bool(recipe.keys() & {"smooth", "kv"})


def main() -> None:
    """Train, quantize in every way, print perplexities."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--held-out-characters", type=int, default=20000)
    options = parser.parse_args()
    ids = library_text()
    held_out = ids[-options.held_out_characters :]
    rest = ids[: -options.held_out_characters]
    rows = []
    with TemporaryDirectory() as place:
        plain, wide = Path(place) / "trained", Path(place) / "outliers"
        loss = train(plain, torch.tensor(rest), options.seconds)
        with_outliers(plain, wide)
        for source in (plain, wide):
            for number, (name, recipe, characters) in enumerate(CASES):
                found = [
                    perplexity(source, Path(place) / f"{source.name}-{number}-{sample}", name, recipe,
                               rest[100_000 + sample * CALIBRATION :][:characters], held_out)
                    for sample in range(SAMPLES if _is_calibrated(name, recipe) else 1)
                ]  # fmt: skip
                settings = ", ".join(f"{key} {getattr(value, 'name', value)}" for key, value in recipe.items())
                losses = [100.0 * (after / before - 1.0) for before, after in found]
                rows.append((source.name, name, settings, characters, len(losses), found[0][0],
                             statistics.median(losses), min(losses), max(losses)))  # fmt: skip
    columns = ("model", "precision", "recipe", "calibrated on", "samples", "before", "loss %", "least %", "most %")
    print_table(columns, rows, title=f"perplexity on {len(held_out)} characters; trained to a loss of {loss:.3f}")


if __name__ == "__main__":
    main()

"""Whether a wanted speed-up is reached: sizes chosen by measured prices, timed against the whole model in turn.

    python -m benchmarks.pruned_speed [--model SHAPE] [--chunk 512] [--context 0] [--output FILE]

Beside each, equal shares of channels, heads and layers removed until they are as fast by the same prices: what share of
importance both keep. Shapes without weights have importance drawn at random, the same for both.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from db.files.documents import write_json
from profiler.model import ModelShape, load_model_shape, model_from_config
from runtime.prune.budget import Losses, Sizes, cut_by_shares
from runtime.prune.importance import Importance, LayerImportance
from runtime.prune.prices import ChunkWork, Prices, config_of, find_prices, measured_speedup
from runtime.prune.prune import Wanted, choose_sizes
from service.cli.output import print_table

WANTED = (1.1, 1.3, 1.5, 2.0)
# On a CPU: what one core runs in a second or so.
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip


def random_importance(shape: ModelShape) -> Importance:
    """Few units that add much, many that add little, as in trained models."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, total: float) -> torch.Tensor:
        scores = torch.rand(count, generator=generator).pow(4.0)
        return total * scores / scores.sum()

    spec = shape.layer
    layers = tuple(
        LayerImportance(
            channels=drawn(spec.dense.intermediate.count, 0.05), groups=drawn(spec.attention.kv_heads.count, 0.03),
            whole=0.08 + 0.1 * float(torch.rand((), generator=generator)),
        )
        for _ in range(shape.num_layers)
    )  # fmt: skip
    return Importance(layers=layers, hidden=torch.ones(shape.hidden_size), final_norm_energies=None)


def equal_shares(shape: ModelShape, prices: Prices, speedup: float, multiple: int) -> Sizes:
    """The least equal share of every kind that is as fast."""
    whole = Sizes.of(shape)
    for percent in range(1, 100):
        share = percent / 100.0
        sizes = cut_by_shares(shape, channels=share, heads=share, layers=share, hidden=0.0, multiple=multiple)
        if prices.seconds(whole) / prices.seconds(sizes) >= speedup:
            return sizes
    return sizes


def main() -> None:
    """Measure prices, choose, measure what was chosen, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a shape's name or a folder [default: a small one]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.model:
        shape = load_model_shape(options.model)
    else:
        shape = model_from_config(dict(load_model_shape("llama-3.2-1b").config) | SMALL, name="small")
    on_card = options.device == "cuda"
    if not on_card:
        torch.set_num_threads(1)
    multiple = 128 if on_card else 16
    work = ChunkWork(
        chunk=options.chunk, context=options.context, dtype=torch.bfloat16 if on_card else torch.float32,
        device=torch.device(options.device),
    )  # fmt: skip
    prices, importance = find_prices(shape, work, multiple=multiple), random_importance(shape)
    whole, losses, rows = Sizes.of(shape), Losses.of(importance), []
    for speedup in WANTED:
        chosen = choose_sizes(shape, Wanted(speedup=speedup, multiple=multiple), importance, prices)
        equal = equal_shares(shape, prices, speedup, multiple)
        for name, sizes in (("chosen", chosen), ("equal shares", equal)):
            lost = losses.lost(
                whole.layers - sizes.layers, whole.channels - sizes.channels, whole.kv_heads - sizes.kv_heads
            )  # fmt: skip
            smaller = model_from_config(config_of(shape, replace(sizes)), name=shape.name)
            predicted = prices.seconds(whole) / prices.seconds(sizes)
            measured = measured_speedup(shape, smaller, work)
            rows.append((speedup, name, sizes.layers, sizes.channels, sizes.kv_heads, 1.0 - lost / losses.total,
                         predicted, measured, 100.0 * (measured / speedup - 1.0)))  # fmt: skip
    columns = ("wanted", "by", "layers", "channels", "KV heads", "kept", "predicted", "measured", "off %")
    device = torch.cuda.get_device_name() if on_card else "one CPU thread"
    title = f"{shape.name}, chunk {work.chunk} after {work.context}, {device}, torch {torch.__version__}"
    print_table(columns, rows, title=title)
    if options.output:
        write_json(options.output, {"title": title, "columns": columns, "rows": rows})


if __name__ == "__main__":
    main()

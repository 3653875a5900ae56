"""Which kernel the library takes for a layer's products at each number of rows on a card, and how long it takes.

    python -m benchmarks.product_tiles [--model NAME] [--tp-size N] [--most-rows M]

The names of the kernels tell their tiles: nvjet_sm90_tst_192x128_... computes 192 x 128 outputs a block. Of a product
in several kernels the longest is shown; the least of three times, on a card that rested, weights perhaps in the cache.
"""

from __future__ import annotations

import argparse
import re

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from profiler.model import load_model_shape
from profiler.points.grid import TILE_TOKENS
from service.cli.output import print_table

TIMES = 3
TILE = re.compile(r"\d+x\d+")


def kernels_of(weight: torch.Tensor, x: torch.Tensor, rows: list[int]) -> list[tuple[str, float]]:
    """(name, least microseconds) of the product's kernel at each number of rows."""
    for count in rows:
        F.linear(x[:count], weight)
    found = []
    for count in rows:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(TIMES):
                F.linear(x[:count], weight)
            torch.cuda.synchronize()
        kernels = [event for event in recorded.events() or [] if str(event.device_type).endswith("CUDA")]
        longest = max(kernels, key=lambda event: event.time_range.elapsed_us())
        same = [event.time_range.elapsed_us() for event in kernels if event.name == longest.name]
        found.append((longest.name, min(same)))
    return found


@torch.inference_mode()
def main() -> None:
    """Print a table for each product."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--most-rows", type=int, default=3072)
    options = parser.parse_args()
    rows = list(range(TILE_TOKENS, options.most_rows + 1, TILE_TOKENS))
    for name, (n, k) in load_model_shape(options.model).layer.products(options.tp_size).items():
        weight = 0.02 * torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(rows[-1], k, device="cuda", dtype=torch.bfloat16)
        table: list[list[object]] = []
        for count, (kernel, us) in zip(rows, kernels_of(weight, x, rows), strict=True):
            tile = TILE.search(kernel)
            table.append([count, tile.group() if tile else kernel, us, 2 * count * n * k / us * 1e-6])
        print_table(["rows", "tile", "us", "TFLOP/s"], table, title=f"{name}: {n} x {k}, TP{options.tp_size}")


if __name__ == "__main__":
    main()

"""How a card's speed goes after a rest: whole layers over and over, microseconds a layer by the time since the start.

python -m benchmarks.gpu_clocks [--model NAME] [--rest-s S]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from statistics import mean

import torch

from profiler.hardware.device import cache_bytes, free_bytes
from profiler.kernels.attention import available_kernels
from profiler.measure.background_load import BackgroundLoad, keep_busy
from profiler.measure.operations.operators import Operators
from profiler.measure.operations.workspace import Workspace
from profiler.measure.timing import call_seconds
from profiler.model import load_model_shape, precision_of
from profiler.points.point import Op, Point
from service.cli.output import print_table

CHUNK, CONTEXT = 2048, 8192
UNTIL_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)


@torch.inference_mode()
def main() -> None:
    """Rest, run, and print the mean of each stretch of time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--rest-s", type=float, default=1.0)
    options = parser.parse_args()
    device, precision = torch.device("cuda", 0), precision_of("bfloat16")
    torch.cuda.set_device(device)
    shape = load_model_shape(options.model)
    kernel = available_kernels(device, precision.activations.torch_dtype)[0]
    workspace = Workspace(
        device, precision, cold_bytes=2 * cache_bytes(device), limit_bytes=int(0.4 * free_bytes(device))
    )  # fmt: skip
    operators = Operators(shape, CHUNK + CONTEXT, workspace, lambda _chunk, _context: kernel)
    sizes = {"chunk": CHUNK, "context": CONTEXT} | shape.layer.sizes(1)
    point = Point(op=Op.LAYER, dtype=precision.name, shape=sizes, variant=shape.layer.variant)
    run = operators.prepare(point).run
    call_seconds(run, device)
    load = BackgroundLoad(run, call_seconds(run, device), device)
    time.sleep(options.rest_s)
    events = keep_busy(load.run, UNTIL_S[-1], device)
    ends_s = [events[0].elapsed_time(event) * 1e-3 for event in events]
    rows: list[list[object]] = []
    for first_s, last_s in pairwise((0.0, *UNTIL_S)):
        times = [end - start for start, end in pairwise(ends_s) if first_s <= start < last_s]
        if times:
            layer_us = 1e6 * mean(times) / load.num_layers
            rows.append([last_s, layer_us, layer_us * load.num_layers / load.usual_us])
    print_table(
        ["until s", "us a layer", "of the usual"], rows,
        title=f"{CHUNK} tokens after {CONTEXT}, {shape.name}, after {options.rest_s:g} s of rest",
    )  # fmt: skip


if __name__ == "__main__":
    main()

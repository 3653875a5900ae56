"""Attention under windows and sinks on one card against float64; layers of Transformers recorded against launched.

    python -m benchmarks.gpu_masks CONFIG.json... [--layers N] [--device cpu]

Each CONFIG.json is a published configuration, of which the first layers are built with random weights in bfloat16. A
prompt goes through them in chunks, launched and recorded: both must give the same numbers, and the times are printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_library import plain
from profiler.kernels.attention import attend, available_kernels
from profiler.kernels.attention_kernel import Masking
from profiler.kernels.recording import new_scratch, record
from profiler.library.found import find
from profiler.library_layers.part import StagePart
from service.cli.output import print_table

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 64  # of gpt-oss
CASES = {"cuda": ((300, 0), (257, 1000), (1, 500), (2048, 6144)), "cpu": ((60, 0), (57, 300))}  # chunk, context
MASKS = ((128, True), (None, True), (128, False), (4096, False))  # window, sinks
CHUNKS = {"cuda": (512, 1024, 100, 2048, 64, 1024), "cpu": (40, 17)}
_REPEATS = 5


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Check and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", type=Path, nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    rows = [(*mask, *(attention_error(mask, case, device) for case in CASES[device.type])) for mask in MASKS]
    cases = [f"{chunk} after {context}" for chunk, context in CASES[device.type]]
    print_table(("window", "sinks", *cases), rows, title="Largest error against float64, of the largest value there")
    for config in options.configs:
        compare(config, options.layers, device)


def attention_error(mask: tuple[int | None, bool], case: tuple[int, int], device: torch.device) -> float:
    """Of attention in bfloat16 on some rows."""
    (window, has_sinks), (chunk, context) = mask, case
    torch.manual_seed(chunk)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    q = make(chunk, HEADS, HEAD_DIM).transpose(0, 1)
    k, v = (make(KV_HEADS, context + chunk, HEAD_DIM) for _ in range(2))
    sinks = make(HEADS) if has_sinks else None
    kernel = available_kernels(device, torch.bfloat16)[0]
    found = attend(kernel, q, k, v, Masking(window=window, sinks=sinks))
    rows = torch.tensor(sorted({0, chunk // 3, chunk // 2, chunk - 1}), device=device)
    exact_k, exact_v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
    scores = q[:, rows].double() @ exact_k.transpose(1, 2) * HEAD_DIM**-0.5
    distance = (context + rows)[:, None] - torch.arange(context + chunk, device=device)
    scores = scores.masked_fill((distance < 0) | (distance >= (window or context + chunk)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, len(rows), 1)], dim=-1)
    exact = scores.softmax(dim=-1)[..., : context + chunk] @ exact_v
    return float((found[:, rows].double() - exact).abs().max() / exact.abs().max())


def compare(config: Path, layers: int, device: torch.device) -> None:
    """A model's first layers, launched and recorded."""
    found = find(plain(json.loads(config.read_text()), layers))
    part = StagePart(found, range(layers), device=device, dtype=torch.bfloat16)
    chunks, total = CHUNKS[device.type], sum(CHUNKS[device.type])
    ids = torch.randint(int(found.text.vocab_size), (total,), device=device)
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    caches = [part.cache(total) for _ in range(2)]
    for cache in caches:
        for count in chunks:
            part.run(part.embed(ids[:count]), cache, 0)
            cache.begin(0)

    def run(index: int, which: int) -> torch.Tensor:
        start, count = starts[index], chunks[index]
        return part.run(part.embed(ids[start : start + count]), caches[which], start)

    print(f"{config.name}: recordable: {part.is_recordable}", flush=True)
    launched = [run(index, 0).clone() for index in range(len(chunks))]
    table = list[tuple[object, ...]]()
    if not part.is_recordable:
        return
    scratch = new_scratch(device)
    replays: list[Callable[[], torch.Tensor]] = [
        record(partial(run, index, 1), device, scratch) for index in range(len(chunks))
    ]
    for _ in range(2):
        caches[1].begin(0)
        replayed = [replay().clone() for replay in replays]
    for index, count in enumerate(chunks):
        differs = float((replayed[index].float() - launched[index].float()).abs().max())
        scale = float(launched[index].float().abs().max())
        table.append((count, starts[index], differs, scale))
    launched_s, replayed_s = [], []
    for _ in range(_REPEATS):
        caches[0].begin(0)
        launched_s.append(seconds(lambda: [run(index, 0) for index in range(len(chunks))], device))
        caches[1].begin(0)
        replayed_s.append(seconds(lambda: [replay() for replay in replays], device))
    print_table(("chunk", "context", "largest difference", "largest value"), table, title=f"{layers} layers, recorded")
    print(f"A pass launched {1e3 * median(launched_s):.2f} ms, recorded {1e3 * median(replayed_s):.2f} ms", flush=True)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call and what it leaves on the card's queue."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""Times of products and of quantizing in every precision, beside bfloat16, with a cold cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.precision_arms import EPS, FORMATS, Arms, Call, Sizes, eager_rows
from benchmarks.precision_runs import emit, guarded
from profiler.hardware.device import cache_bytes
from profiler.kernels.entry import PLAIN
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.model import PRECISIONS

REPEATS, SLEEP_CYCLES = 15, 400_000


def times_ms(calls: Mapping[str, Call], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call, in turn, the cache flushed before each; the first calls tune and build.

    The card is kept busy before the first event: launching takes the host longer than a small kernel runs.
    """
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        with guarded(name):
            for _ in range(3):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            ready[name] = call
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(REPEATS if device.type == "cuda" else 2):
        for name, call in ready.items():
            flush.zero_()
            samples[name].append(_time_ms(call, device))
    return {name: statistics.median(values) for name, values in samples.items()}


def _time_ms(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def time_products(sizes: Sizes, name: str) -> None:
    """Products alone at every number of rows: `products`; with the norm before them: `chains`."""
    card = torch.cuda.get_device_name(sizes.device) if sizes.device.type == "cuda" else "cpu"
    for product, (n, k) in sizes.products.items():
        arms = Arms(sizes, n, k)
        for m in sizes.rows:
            found = times_ms(arms.products(m) if name == "products" else arms.chains(m), sizes.device)
            for arm, ms in found.items():
                rate = 2.0 * m * n * k / ms * 1e-9
                peak = PRECISIONS[arm.split()[0]].product_peak_flops(card)
                share = None if peak is None else 100.0 * rate * 1e12 / peak
                speedup = found["bfloat16"] / ms if "bfloat16" in found else None
                emit(
                    part=name, product=product, m=m, arm=arm, ms=ms, tflops=rate, percent_of_peak=share,
                    of_bfloat16=speedup,
                )  # fmt: skip


def time_quantizing(sizes: Sizes, _name: str) -> None:
    """Norm and SiLU that end in 8 bits: as one kernel and as two."""
    hidden, intermediate = sizes.hidden, sizes.intermediate
    norm = torch.ones(hidden, device=sizes.device, dtype=torch.bfloat16)
    for m in sizes.quantizing_rows:
        stream, update = sizes.random(m, hidden), sizes.random(m, hidden)
        gate_up, attended = sizes.random(m, 2 * intermediate), sizes.random(m, hidden)
        arms: dict[str, Call] = {
            "norm": partial(PLAIN.norm, stream, norm, EPS),
            "add-norm": partial(PLAIN.add_norm, stream, update, norm, EPS),
            "silu": partial(PLAIN.silu, gate_up),
        }
        for name, dtype in FORMATS.items():
            for kind, fused in (("fused", True), ("two kernels", False)):
                arms |= _quantizing(
                    f"{name} {kind}", QuantizingEntry(dtype=dtype, fused=fused), stream, update, gate_up
                )
            arms[f"take {name}"] = partial(QuantizingEntry(dtype=dtype).take, attended)
        arms["norm int8 eager"] = partial(eager_rows, stream, norm)
        found = times_ms(arms, sizes.device)
        for arm, ms in found.items():
            two = found.get(arm.replace("fused", "two kernels"))
            gain = two / ms if two is not None and arm.endswith("fused") else None
            emit(part="quantizing", m=m, arm=arm, ms=ms, of_two_kernels=gain)


def _quantizing(
    label: str, entry: QuantizingEntry, stream: torch.Tensor, update: torch.Tensor, gate_up: torch.Tensor
) -> dict[str, Call]:
    norm = torch.ones(stream.shape[1], device=stream.device, dtype=stream.dtype)
    return {
        f"norm {label}": partial(entry.norm, stream, norm, EPS),
        f"add-norm {label}": partial(entry.add_norm, stream, update, norm, EPS),
        f"silu {label}": partial(entry.silu, gate_up),
    }

"""Products and quantizing in every precision on one card, fused and not, interleaved, beside bfloat16.

    python -m benchmarks.gpu_precisions [--rows 512,2048,8192,16384] [--output FILE]

Shapes are those of Llama-3-8B. Every kernel is first compared with its reference (tests/profiler/kernels/quantized).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from db.files.documents import write_json
from profiler.hardware.device import cache_bytes
from profiler.kernels import elementwise
from profiler.kernels.entry import PLAIN, Operand
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.kernels.quantized.weight import quantize_weight
from profiler.model import PRECISIONS
from service.cli.output import print_table

HIDDEN, INTERMEDIATE = 4096, 14336
PRODUCTS = ((6144, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
CHECKS = ("quantize", "rms_norm", "silu", "product", "dequantizing")
EPS, REPEATS = 1e-5, 20
Call = Callable[[], object]


def times_ms(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call, in turn, the cache flushed before each; the first runs tune and build."""
    flush = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)
    for call in calls.values():
        for _ in range(3):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in samples.items()}


def product_arms(m: int, n: int, k: int, device: torch.device) -> dict[str, Call]:
    """One product of quantized operands, or with the quantizing of its input: `chain`."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) * k**-0.5
    int8, fp8 = (quantize_weight(weight, dtype) for dtype in (torch.int8, torch.float8_e4m3fn))
    int8_in, fp8_in = (QuantizingEntry(dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn))
    fused, unfused = QuantizedLinear(int8, int8_in), QuantizedLinear(int8, int8_in, fused=False)
    fp8_linear, w8a16 = QuantizedLinear(fp8, fp8_in), DequantizingLinear(int8)
    rows: tuple[Operand, Operand] = (int8_in.take(x), fp8_in.take(x))
    norm = torch.ones(k, device=device, dtype=torch.bfloat16)

    def eager() -> torch.Tensor:
        """As torch's own operators quantize: each reads and writes everything."""
        scales = F.rms_norm(x, (k,), norm, EPS).abs().amax(-1, keepdim=True).float() / 127.5
        values = (F.rms_norm(x, (k,), norm, EPS).float() / scales).round().clamp(-128, 127).to(torch.int8)
        sums = torch._int_mm(values, int8.values.t())
        return (sums.float() * scales * int8.scales.view(-1)).bfloat16()

    arms: dict[str, Call] = {
        "bf16": lambda: F.linear(x, weight),
        "w8a16": lambda: w8a16(x),
        "w8a8": lambda: fused(rows[0]),
        "w8a8 int_mm": lambda: unfused(rows[0]),
        "fp8": lambda: fp8_linear(rows[1]),
        "bf16 chain": lambda: F.linear(PLAIN.norm(x, norm, EPS), weight),
        "w8a8 chain": lambda: fused(int8_in.norm(x, norm, EPS)),
        "fp8 chain": lambda: fp8_linear(fp8_in.norm(x, norm, EPS)),
    }
    if m > 16:
        arms["w8a8 chain unfused"] = lambda: unfused(int8_in.take(elementwise.rms_norm(x, norm, EPS)))
        arms["w8a8 chain eager"] = eager
    return arms


def quantizing_arms(m: int, device: torch.device) -> dict[str, Call]:
    """Norm and SiLU that end in 8 bits as one kernel and as two."""
    stream, update = (torch.randn(m, HIDDEN, device=device, dtype=torch.bfloat16) for _ in range(2))
    norm = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    gate_up = torch.randn(m, 2 * INTERMEDIATE, device=device, dtype=torch.bfloat16)
    arms: dict[str, Call] = {
        "norm, plain": lambda: PLAIN.add_norm(stream, update, norm, EPS),
        "silu, plain": lambda: PLAIN.silu(gate_up),
    }
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        for kind, fused in (("fused", True), ("two kernels", False)):
            entry = QuantizingEntry(dtype=dtype, fused=fused)
            arms[f"norm {name}, {kind}"] = lambda entry=entry: entry.add_norm(stream, update, norm, EPS)  # type: ignore[misc]
            arms[f"silu {name}, {kind}"] = lambda entry=entry: entry.silu(gate_up)  # type: ignore[misc]
    return arms


def check_kernels() -> Iterator[tuple[str, str]]:
    """Each kernel beside its reference, in a process of its own on the card."""
    root = Path(__file__).parents[1]
    program = root / "tests" / "profiler" / "kernels" / "quantized" / "triton_checks.py"
    for name in CHECKS:
        done = subprocess.run(
            [sys.executable, program, name, "cuda"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        yield name, "equal" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="16,512,2048,8192,16384")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    checks = list(check_kernels())
    print_table(("kernel", "beside its reference"), checks, title=name)
    peaks = {key: precision.product_peak_flops(name) for key, precision in PRECISIONS.items()}
    found: list[dict[str, object]] = []
    for m in map(int, options.rows.split(",")):
        for n, k in PRODUCTS:
            for arm, ms in times_ms(product_arms(m, n, k, device), device).items():
                rate = 2.0 * m * n * k / ms * 1e-9
                peak = peaks.get({"bf16": "bfloat16"}.get(arm.split()[0], arm.split()[0]))
                share = None if peak is None else rate * 1e12 / peak
                found.append({"m": m, "n": n, "k": k, "arm": arm, "ms": ms, "tflops": rate, "of_own_peak": share})
        for arm, ms in times_ms(quantizing_arms(m, device), device).items():
            found.append({"m": m, "n": None, "k": None, "arm": arm, "ms": ms, "tflops": None, "of_own_peak": None})
    columns = ("m", "n", "k", "arm", "ms", "tflops", "of_own_peak")
    print_table(columns, [tuple(row[column] for column in columns) for row in found], title=name)
    if options.output:
        write_json(options.output, {"device": name, "checks": dict(checks), "rows": found})


if __name__ == "__main__":
    main()

"""Every precision on one card beside bfloat16: its kernels checked and timed, fused and not, and a whole model.

    python -m benchmarks.gpu_precisions --output FILE [--only products ...] [--arms w8a8 ...] [--device cpu]

Shapes are those of Llama-3-8B, weights random. Each part runs in a process of its own and hands on its rows as they
come: a kernel that fails takes no others with it. `--device cpu` is a dry run on a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from benchmarks.demo_model import SMALL, write_demo_model
from benchmarks.precision_runs import ROW, UNFUSED, Case, emit, guarded, run_case
from db.files.documents import write_json
from profiler.hardware.device import cache_bytes
from profiler.kernels.entry import PLAIN, Operand
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.kernels.quantized.rounding import widened
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.kernels.quantized.weight import quantize_weight
from profiler.model import PRECISIONS, load_model_shape
from service.cli.output import print_table

ROOT = Path(__file__).parents[1]
CHECKS = ("quantize", "rms_norm", "silu", "product", "dequantizing", "kv")
ARMS = (
    "bfloat16", "w8a16", "w8a8", "w8a8-static", "fp8", "fp8-static", "fp8+kv-fp8", "w8a8+kv-int8",
    "w8a8" + UNFUSED, "fp8" + UNFUSED,
)  # fmt: skip
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EPS, REPEATS, SLEEP_CYCLES = 1e-5, 15, 400_000
STATIC_RANGE = 5.0  # standard deviations that a static range holds
LIMIT_S = 420.0  # of a part
MOST_ERROR = 0.005  # of a product, against float64
Call = Callable[[], object]


class Sizes:
    """What is measured: the sizes of the model, and of a dry run."""

    def __init__(self, device: torch.device) -> None:
        self.device, full = device, device.type == "cuda"
        self.hidden, self.intermediate = (4096, 14336) if full else (64, 96)
        self.qkv = 6144 if full else 96
        self.rows = (16, 512, 1024, 2048, 4096, 8192, 16384) if full else (5, 32)
        self.quantizing_rows = (512, 8192) if full else (32,)
        self.checked_rows = (1, 3, 16, 17, 200, 1000, 2048) if full else (3, 20)
        self.cases = {
            "prefill-8192": Case(prompt_tokens=8192, chunk=8192),
            "prefill-32768": Case(prompt_tokens=32768, chunk=8192, repeats=3),
            "decode": Case(prompt_tokens=512, chunk=512, new_tokens=65),
        }
        if not full:
            self.cases = {
                "prefill-8192": Case(prompt_tokens=64, chunk=32, repeats=2),
                "decode": Case(prompt_tokens=16, chunk=16, new_tokens=4, repeats=2),
            }

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the products of a layer."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def random(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers in bfloat16."""
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16).mul_(scale)


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


class Arms:
    """One product [m, n, k] in every precision, of operands that are there, or with the norm before it."""

    def __init__(self, sizes: Sizes, n: int, k: int) -> None:
        self.sizes, self.n, self.k = sizes, n, k
        self.weight = sizes.random(n, k, scale=k**-0.5)
        self.quantized = {name: quantize_weight(self.weight, dtype) for name, dtype in FORMATS.items()}
        self.norm = torch.ones(k, device=sizes.device, dtype=torch.bfloat16)

    def linears(self, *, fused: bool) -> dict[str, QuantizedLinear | DequantizingLinear]:
        """A product for each precision."""
        made: dict[str, QuantizedLinear | DequantizingLinear] = {
            "w8a16": DequantizingLinear(self.quantized["int8"], fused=fused)
        }
        for name, kind in (("w8a8", "int8"), ("fp8", "fp8")):
            dtype, weight = FORMATS[kind], self.quantized[kind]
            largest = 127.5 if kind == "int8" else 448.0
            static = torch.full((1,), STATIC_RANGE / largest, device=self.sizes.device)
            made[name] = QuantizedLinear(weight, QuantizingEntry(dtype=dtype, fused=fused), fused=fused)
            entry = QuantizingEntry(dtype=dtype, scale=static, fused=fused)
            made[f"{name}-static"] = QuantizedLinear(weight, entry, fused=fused)
        return made

    def products(self, m: int) -> dict[str, Call]:
        """Products alone: their operands are there."""
        x = self.sizes.random(m, self.k)
        arms: dict[str, Call] = {"bfloat16": lambda: F.linear(x, self.weight)}
        for fused in (True, False):
            for name, linear in self.linears(fused=fused).items():
                arms[name + ("" if fused else UNFUSED)] = _calling(linear, linear.entry.take(x))
        if self.sizes.device.type == "cuda":
            arms |= self._library_arms(x)
        return arms

    def _library_arms(self, x: torch.Tensor) -> dict[str, Call]:
        """What the libraries' products take alone, and our kernel in the place of `torch._scaled_mm`."""
        from profiler.kernels.quantized.triton_product import scaled_product

        int8, fp8 = self.quantized["int8"], self.quantized["fp8"]
        rows, wide = (QuantizingEntry(dtype=dtype).take(x) for dtype in FORMATS.values())
        arms: dict[str, Call] = {
            "fp8 triton": lambda: scaled_product(wide.values, wide.scales, fp8.values, fp8.scales, None, x.dtype),
        }
        if x.shape[0] > 16:
            arms["w8a8 int_mm alone"] = lambda: torch._int_mm(rows.values, int8.values.t())
        return arms

    def chains(self, m: int) -> dict[str, Call]:
        """A norm, quantizing, the product, dequantizing: in fused kernels, in the best unfused ones, in torch's own."""
        x = self.sizes.random(m, self.k)
        norm = self.norm
        arms: dict[str, Call] = {"bfloat16": lambda: F.linear(PLAIN.norm(x, norm, EPS), self.weight)}
        for fused in (True, False):
            for name, linear in self.linears(fused=fused).items():
                arms[name + ("" if fused else UNFUSED)] = _norming(linear, x, norm)
        if m > 16 and self.sizes.device.type == "cuda":
            arms["w8a8 eager"] = lambda: self._eager(x)
        return arms

    def _eager(self, x: torch.Tensor) -> torch.Tensor:
        """As torch's own operators quantize: each reads and writes everything."""
        normed = F.rms_norm(x, (self.k,), self.norm, EPS)
        scales = normed.abs().amax(-1, keepdim=True).float() / 127.5
        values = (normed.float() / scales).round().clamp(-128, 127).to(torch.int8)
        sums = torch._int_mm(values, self.quantized["int8"].values.t())
        return (sums.float() * scales * self.quantized["int8"].scales.view(-1)).bfloat16()


def _calling(linear: QuantizedLinear | DequantizingLinear, x: Operand) -> Call:
    return lambda: linear(x)


def _norming(linear: QuantizedLinear | DequantizingLinear, x: torch.Tensor, norm: torch.Tensor) -> Call:
    return lambda: linear(linear.entry.norm(x, norm, EPS))


def check_kernels(sizes: Sizes) -> None:
    """Each Triton kernel beside its reference in a process of its own, and each product at the model's sizes."""
    if sizes.device.type == "cuda":
        with ThreadPoolExecutor(len(CHECKS)) as pool:
            for name, said in zip(CHECKS, pool.map(_checked, CHECKS), strict=True):
                emit(part="check", kernel=name, result=said)
        with guarded("blocks"):
            check_blocks(sizes)
            emit(part="check", kernel="every size of block", result="looked at; failures are named")
    for product, (n, k) in sizes.products.items():
        arms = Arms(sizes, n, k)
        for m in sizes.checked_rows:
            x = sizes.random(m, k)
            for fused in (True, False):
                for name, linear in arms.linears(fused=fused).items():
                    arm = name + ("" if fused else UNFUSED)
                    with guarded(f"check {arm} {product} m={m}"):
                        emit(part="check", kernel=arm, product=product, m=m, error=relative_error(linear, x))


def check_blocks(sizes: Sizes) -> None:
    """Every size of block that a kernel may choose, by itself: tuning looks at times alone."""
    from profiler.kernels.quantized import triton_product, triton_weight

    kernels = {
        "w8a8": (triton_product._scaled_product, (8, 60, 300, 2048)),
        "fp8": (triton_product._scaled_product, (8, 60)),
        "w8a16": (triton_weight._dequantizing_product, (8, 60, 300, 2048)),
        "w8a16 few rows": (triton_weight._few_rows, (1, 3)),
    }
    for product in ("qkv", "down"):
        arms = Arms(sizes, *sizes.products[product])
        linears = arms.linears(fused=True)
        for name, (kernel, rows) in kernels.items():
            every = list(kernel.configs)
            for config in every:
                kernel.configs = [config]
                kernel.cache.clear()
                for m in rows:
                    x = sizes.random(m, arms.k)
                    with guarded(f"{name} {config} {product} m={m}"):
                        error = relative_error(linears[name.split()[0]], x)
                        if not error < MOST_ERROR:
                            emit(part="failure", arm=f"{name} {product} m={m}", error=f"{error} with {config}")
            kernel.configs = every
            kernel.cache.clear()


def _checked(name: str) -> str:
    program = ROOT / "tests" / "profiler" / "kernels" / "quantized" / "triton_checks.py"
    command, env = [sys.executable, str(program), name, "cuda"], os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=env)
    except subprocess.TimeoutExpired:
        return "no answer in 300 s"
    return "equal" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1][:500]


def relative_error(linear: QuantizedLinear | DequantizingLinear, x: torch.Tensor) -> float:
    """How far a product is from the same operands' in float64; bfloat16's rounding alone is 0.0017."""
    operand = linear.entry.take(x)
    found = linear(operand).double()
    values = linear.values.t() if getattr(linear, "transposed", False) else linear.values
    scales = operand.scales if isinstance(operand, QuantizedRows) else 1.0
    left = (widened(operand.values) if isinstance(operand, QuantizedRows) else operand).double() * scales
    exact = left @ (widened(values).double() * linear.scales).t()
    return float((found - exact).norm() / exact.norm())


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
            "norm": lambda stream=stream: PLAIN.norm(stream, norm, EPS),  # type: ignore[misc]
            "add-norm": lambda stream=stream, update=update: PLAIN.add_norm(stream, update, norm, EPS),  # type: ignore[misc]
            "silu": lambda gate_up=gate_up: PLAIN.silu(gate_up),  # type: ignore[misc]
        }
        for name, dtype in FORMATS.items():
            for kind, fused in (("fused", True), ("two kernels", False)):
                arms |= _quantizing(
                    f"{name} {kind}", QuantizingEntry(dtype=dtype, fused=fused), stream, update, gate_up
                )
            take = QuantizingEntry(dtype=dtype)
            arms[f"take {name}"] = lambda take=take, attended=attended: take.take(attended)  # type: ignore[misc]
        arms["norm int8 eager"] = lambda stream=stream: _eager_norm(stream, norm)  # type: ignore[misc]
        found = times_ms(arms, sizes.device)
        for arm, ms in found.items():
            two = found.get(arm.replace("fused", "two kernels"))
            gain = two / ms if two is not None and arm.endswith("fused") else None
            emit(part="quantizing", m=m, arm=arm, ms=ms, of_two_kernels=gain)


def _eager_norm(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    normed = F.rms_norm(x, norm.shape, norm, EPS)
    scales = normed.abs().amax(-1, keepdim=True).float() / 127.5
    return (normed.float() / scales).round().clamp(-128, 127).to(torch.int8)


def _quantizing(
    label: str, entry: QuantizingEntry, stream: torch.Tensor, update: torch.Tensor, gate_up: torch.Tensor
) -> dict[str, Call]:
    norm = torch.ones(stream.shape[1], device=stream.device, dtype=stream.dtype)
    return {
        f"norm {label}": lambda: entry.norm(stream, norm, EPS),
        f"add-norm {label}": lambda: entry.add_norm(stream, update, norm, EPS),
        f"silu {label}": lambda: entry.silu(gate_up),
    }


PARTS: dict[str, Callable[[Sizes, str], None]] = {
    "products": time_products,
    "chains": time_products,
    "quantizing": time_quantizing,
}


def run_part(name: str, arms: Sequence[str], device: torch.device) -> None:
    """One part, in this process."""
    sizes = Sizes(device)
    if name == "checks":
        check_kernels(sizes)
    elif name in PARTS:
        PARTS[name](sizes, name)
    elif device.type == "cuda":
        run_case(sizes.cases[name], arms, load_model_shape("llama-3-8b"), device.type)
    else:
        with TemporaryDirectory() as folder:
            write_demo_model(Path(folder), SMALL)
            run_case(sizes.cases[name], arms, load_model_shape(folder), device.type)


def collect(name: str, arms: Sequence[str], device: str) -> Iterator[dict[str, object]]:
    """The rows of a part as they come, of a process of its own; the last one says how it ended."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.gpu_precisions",
        "--part",
        name,
        "--device",
        device,
        "--arms",
        *arms,
    ]
    # What one part has tuned, the next one takes.
    env = os.environ | {"TRITON_CACHE_AUTOTUNING": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(_end_late, process, LIMIT_S)
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
        code = waited.result()
    yield {"part": "end", "of": name, "exit_code": code, "seconds": time.monotonic() - started}


def _end_late(process: subprocess.Popen[str], limit_s: float) -> int:
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait(30.0)


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table for each kind of row."""
    for part in dict.fromkeys(row["part"] for row in rows):
        if part == "kernels":
            continue
        of_part = [row for row in rows if row["part"] == part]
        columns = [name for name in dict.fromkeys(key for row in of_part for key in row) if name != "part"]
        print_table(columns, [tuple(row.get(column) for column in columns) for row in of_part], title=str(part))


def main() -> None:
    """Run the parts one after another, keep their rows as they come, print tables."""
    every = ["checks", "quantizing", "prefill-8192", "decode", "prefill-32768", "products", "chains"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=every, choices=every)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="of a whole model")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=every, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.part:
        run_part(options.part, options.arms, device)
        return
    about = {"torch": torch.__version__, "device": options.device}
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    rows: list[dict[str, object]] = []
    known = [name for name in options.only if name in Sizes(device).cases or not name.startswith(("pre", "dec"))]
    for name in known:
        before = len(rows)
        for row in collect(name, options.arms, options.device):
            rows.append(row)
            if options.output:
                write_json(options.output, about | {"rows": rows})
        print_rows(rows[before:])


if __name__ == "__main__":
    main()

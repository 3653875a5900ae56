"""Kernels of every precision held against their references and against float64, each size of block by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.precision_arms import Arms, Sizes
from benchmarks.precision_runs import UNFUSED, emit, guarded
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.kernels.quantized.rounding import widened
from profiler.kernels.quantized.rows import QuantizedRows

ROOT = Path(__file__).parents[1]
CHECKS = ("quantize", "rms_norm", "silu", "product", "dequantizing", "kv")
MOST_ERROR = 0.005  # of a product, against float64


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
        "w8a16 few rows": (triton_weight._few_words, (1, 3)),
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

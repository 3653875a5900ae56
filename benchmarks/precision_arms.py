"""Products of one layer in every precision, fused and not, at the sizes of Llama-3-8B or of a dry run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.precision_runs import UNFUSED, Case
from profiler.kernels.entry import PLAIN
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.kernels.quantized.weight import quantize_weight

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
EPS = 1e-5
STATIC_RANGE = 5.0  # standard deviations that a static range holds
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
                arms[name + ("" if fused else UNFUSED)] = partial(linear, linear.entry.take(x))
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
        """The product of rows that torch's own operators quantized."""
        values, scales = eager_rows(x, self.norm)
        sums = torch._int_mm(values, self.quantized["int8"].values.t())
        return (sums.float() * scales * self.quantized["int8"].scales.view(-1)).bfloat16()


def _norming(linear: QuantizedLinear | DequantizingLinear, x: torch.Tensor, norm: torch.Tensor) -> Call:
    return lambda: linear(linear.entry.norm(x, norm, EPS))


def eager_rows(x: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows normed and quantized to int8, with their scales, by torch's own operators: each reads and writes all."""
    normed = F.rms_norm(x, norm.shape, norm, EPS)
    scales = normed.abs().amax(-1, keepdim=True).float() / 127.5
    return (normed.float() / scales).round().clamp(-128, 127).to(torch.int8), scales

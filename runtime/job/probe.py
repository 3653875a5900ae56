"""How fast the machine is beside a run: the large product that every profile has, timed again by each rank."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from db.rows.measurements import Measurement
from profiler.kernels.linear import Linear
from profiler.points.point import Op

_SAMPLES = 3
_LEAST_S = 0.03  # of each sample: a card's clock settles within some hundredths of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A square product of plain numbers that the profile timed on as many ranks at once.

    size: rows, inputs and outputs. profiled_s: its seconds then.
    """

    size: int
    dtype: str
    profiled_s: float

    @torch.inference_mode()
    def slowdown(self, device: torch.device) -> float:
        """How much longer the product takes than in the profile: 1.2 is a machine a fifth slower.

        Raises torch.OutOfMemoryError where a card has no room for three matrices.
        """
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        weight, x = (
            torch.randn(self.size, self.size, device=device, dtype=dtype, generator=generator).mul_(self.size**-0.5)
            for _ in range(2)
        )
        linear = Linear(weight)
        del weight

        def seconds(calls: int) -> float:
            _wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                linear(x)
            _wait(device)
            return (time.perf_counter() - started) / calls

        seconds(1)  # makes what a product needs
        calls = math.ceil(_LEAST_S / seconds(1))
        return median(seconds(calls) for _ in range(_SAMPLES)) / self.profiled_s


def find_probe(rows: Iterable[Measurement], *, dtype: str, world_size: int) -> Probe | None:
    """The product among a hardware's rows, as timed on `world_size` ranks at once; None where it was not."""
    for row in rows:
        if (row.op, row.dtype, row.busy_ranks) == (Op.MATMUL_CEILING, dtype, world_size) and not row.noisy:
            return Probe(size=row.shape["m"], dtype=dtype, profiled_s=1e-6 * row.median_us)
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

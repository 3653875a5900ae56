"""How fast the machine is beside a run: the large product that every profile has, timed again by each rank.

A card's clock goes with the power it draws: the product alone, over and over, meets the power limit and is up to a
fourth slower than between a model's layers, where the profile timed it. So on a card it is timed between rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from db.rows.measurements import Measurement
from profiler.comm.links.group import Groups
from profiler.kernels.linear import Linear
from profiler.points.point import Op

_SAMPLES = 3
_LEAST_S = 0.03  # of each sample on a CPU, which a scheduler divides by hundredths of a second
_AMONG_ROUNDS_S = 0.5  # of rounds on a card, and at least _SAMPLES of them
_MOST_SAMPLES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A square product of plain numbers that the profile timed on as many ranks at once.

    size: rows, inputs and outputs. profiled_s: its seconds then.
    """

    size: int
    dtype: str
    profiled_s: float

    @torch.inference_mode()
    def slowdown(self) -> float:
        """How much longer the product takes on the CPU than in the profile: 1.2 is a machine a fifth slower."""
        product = self._product(torch.device("cpu"))

        def seconds(calls: int) -> float:
            started = time.perf_counter()
            for _ in range(calls):
                product()
            return (time.perf_counter() - started) / calls

        seconds(1)  # makes what a product needs
        calls = math.ceil(_LEAST_S / seconds(1))
        return median(seconds(calls) for _ in range(_SAMPLES)) / self.profiled_s

    @torch.inference_mode()
    def slowdown_among(self, run_round: Callable[[], object], groups: Groups, device: torch.device) -> float | None:
        """The same on a card, a product after each round; None where a card has no room for three matrices.

        run_round: may hold collectives, so that all ranks come here together and run it equally often.
        """
        try:
            product = self._product(device)
            product()
        except torch.OutOfMemoryError:
            product = None
        ready = torch.tensor([product is not None])
        dist.all_reduce(ready, dist.ReduceOp.MIN, group=groups.everyone)
        if product is None or not ready.item():
            return None
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run_round()
        torch.cuda.synchronize(device)
        round_s = time.perf_counter() - started
        count = torch.tensor([max(_SAMPLES, min(_MOST_SAMPLES, int(_AMONG_ROUNDS_S / round_s)))])
        dist.broadcast(count, 0, group=groups.everyone)
        events = []
        for _ in range(int(count.item())):
            run_round()
            start, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product()
            finish.record()
            events.append((start, finish))
        torch.cuda.synchronize(device)
        return 1e-3 * float(median(start.elapsed_time(finish) for start, finish in events)) / self.profiled_s

    def _product(self, device: torch.device) -> Callable[[], object]:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        weight, x = (
            torch.randn(self.size, self.size, device=device, dtype=dtype, generator=generator).mul_(self.size**-0.5)
            for _ in range(2)
        )
        linear = Linear(weight)
        return lambda: linear(x)


def find_probe(rows: Iterable[Measurement], *, dtype: str, world_size: int) -> Probe | None:
    """The product among a hardware's rows, as timed on `world_size` ranks at once; None where it was not."""
    for row in rows:
        if (row.op, row.dtype, row.busy_ranks) == (Op.MATMUL_CEILING, dtype, world_size) and not row.noisy:
            return Probe(size=row.shape["m"], dtype=dtype, profiled_s=1e-6 * row.median_us)
    return None

"""Which attention kernel runs a chunk: the fastest one measured at the nearest (chunk, context)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from profiler.attention import AttentionKernel, available_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One measured attention call."""

    chunk: int
    context: int
    kernel: AttentionKernel
    median_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """A `profiler.round.ChooseKernel`: the best kernel at each measured point, the usual best when there is none."""

    usual: AttentionKernel
    best: tuple[tuple[int, int, AttentionKernel], ...] = ()  # (chunk, context, kernel)

    def __call__(self, chunk: int, context: int) -> AttentionKernel:
        """The kernel for `chunk` tokens after `context` tokens; nearness is that of the logarithms."""
        if chunk == 1:
            return AttentionKernel.SDPA  # decode: nothing to mask, one call, no plan to build for each length
        if not self.best:
            return self.usual

        def distance(point: tuple[int, int, AttentionKernel]) -> float:
            return math.hypot(math.log2(point[0] / chunk), math.log2((point[1] + chunk) / (context + chunk)))

        return min(self.best, key=distance)[2]


def choose_kernels(device: torch.device, dtype: torch.dtype, times: Iterable[KernelTime] = ()) -> KernelChoice:
    """Make the choice from measured times; points at which fewer than two kernels were measured say nothing."""
    kernels = available_kernels(device, dtype)
    points: dict[tuple[int, int], list[KernelTime]] = {}
    for time in times:
        if time.kernel in kernels:
            points.setdefault((time.chunk, time.context), []).append(time)
    fastest = [min(rows, key=lambda row: row.median_us) for rows in points.values() if len(rows) > 1]
    return KernelChoice(usual=kernels[0], best=tuple((row.chunk, row.context, row.kernel) for row in fastest))

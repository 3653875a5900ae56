"""Which attention kernel to take for a (chunk, context): the usual one, or one that measured clearly faster nearby."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from db.measurements import Measurement
from profiler.attention import AttentionKernel
from profiler.point import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """A measured point of one kernel."""

    kernel: AttentionKernel
    chunk: int
    context: int
    median_us: float

    @classmethod
    def of(cls, row: Measurement) -> Self:
        """The time of an attention row."""
        return cls(
            kernel=AttentionKernel(row.variant), chunk=row.shape["chunk"], context=row.shape["context"],
            median_us=row.median_us,
        )  # fmt: skip


# Of the usual kernel's time: what another one must stay below. Contests are few and noise is a few percent, and between
# two of them a kernel of two calls and a merge loses more than it won at a long context.
CLEARLY_FASTER = 0.93


class KernelChoice:
    """Callable (chunk tokens, context) -> kernel. Without measurements it is always `default`, the usual one."""

    def __init__(self, times: Iterable[KernelTime], *, default: AttentionKernel) -> None:
        self.default = default
        self.contests: dict[tuple[int, int], dict[AttentionKernel, float]] = {}  # microseconds at (chunk, context)
        for time in times:
            self.contests.setdefault((time.chunk, time.context), {})[time.kernel] = time.median_us
        # A point where one kernel ran alone decides nothing.
        self.contests = {at: times for at, times in self.contests.items() if len(times) > 1}

    def __call__(self, chunk: int, context: int) -> AttentionKernel:
        """The kernel that won the nearest contest, the usual one unless it lost clearly."""
        nearest = self.nearest(chunk, context)
        if nearest is None:
            return self.default
        times = self.contests[nearest]
        best = min(times, key=lambda kernel: times[kernel])
        usual_us = times.get(self.default)
        return best if usual_us is None or times[best] < CLEARLY_FASTER * usual_us else self.default

    def nearest(self, chunk: int, context: int) -> tuple[int, int] | None:
        """The nearest (chunk, context) where more than one kernel ran, on a logarithmic scale; None without any."""
        return min(self.contests, key=lambda at: _distance(at, (chunk, context)), default=None)


def kernel_times(rows: Iterable[Measurement], heads: Mapping[str, int], *, busy_ranks: int) -> list[KernelTime]:
    """The attention rows of `heads` (heads, kv_heads, head_dim) among `rows`."""
    return [
        KernelTime.of(row)
        for row in rows
        if row.op == Op.ATTENTION
        and row.busy_ranks == busy_ranks
        and all(row.shape[name] == size for name, size in heads.items())
    ]


def _distance(at: tuple[int, int], other: tuple[int, int]) -> float:
    # Contexts shorter than a chunk's own tokens hardly differ from none.
    return sum(abs(math.log((a + 64) / (b + 64))) for a, b in zip(at, other, strict=True))

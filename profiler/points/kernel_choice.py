"""Which attention kernel to take for a (chunk, context): the usual one, or one that measured clearly faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.points.point import Op


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


# Of the usual kernel's time: what another one must stay below. Noise is a few percent.
CLEARLY_FASTER = 0.93
FAR = 4  # times as many tokens, or as few: what was measured there says little


class KernelChoice:
    """Callable (chunk tokens, context) -> kernel. Without measurements it is always `default`, the usual one.

    Kernels work in tiles of rows, so that a chunk is like the next larger one that was measured after several contexts,
    unless that is far and a smaller one nearer. Kernels that were not measured there had no chance.
    """

    def __init__(self, times: Iterable[KernelTime], *, default: AttentionKernel) -> None:
        self.default = default
        self.times: dict[int, dict[AttentionKernel, dict[int, float]]] = {}  # us by chunk, kernel and context
        for time in times:
            self.times.setdefault(time.chunk, {}).setdefault(time.kernel, {})[time.context] = time.median_us
        slopes = {at: {k: by for k, by in kernels.items() if len(by) > 1} for at, kernels in self.times.items()}
        self.known = {at: kernels for at, kernels in slopes.items() if kernels} or self.times

    def __call__(self, chunk: int, context: int) -> AttentionKernel:
        """The kernel that takes the least time, the usual one unless it loses clearly."""
        expected = self.expected_us(chunk, context)
        if not expected:
            return self.default
        best = min(expected, key=lambda kernel: expected[kernel])
        return best if expected[best] < CLEARLY_FASTER * expected.get(self.default, math.inf) else self.default

    def expected_us(self, chunk: int, context: int) -> dict[AttentionKernel, float]:
        """What the kernels with a chance should take, in proportion to the context; {} without measurements."""
        here = {kernel: by[context] for kernel, by in self.times.get(chunk, {}).items() if context in by}
        if here or not self.times:
            return here
        nearest = min((at for at in self.known if at >= chunk), default=max(self.known))
        if nearest > FAR * chunk:
            nearest = min(self.known, key=lambda at: abs(math.log(at / chunk)))
        return {kernel: _at_context(by_context, context) for kernel, by_context in self.known[nearest].items()}


class Contests:
    """Points at which more than one kernel was measured, with the time of each in microseconds."""

    def __init__(self, times: Iterable[KernelTime]) -> None:
        at: dict[tuple[int, int], dict[AttentionKernel, float]] = {}
        for time in times:
            at.setdefault((time.chunk, time.context), {})[time.kernel] = time.median_us
        self.at = {point: found for point, found in at.items() if len(found) > 1}

    def nearest(self, chunk: int, context: int) -> tuple[int, int] | None:
        """The nearest (chunk, context) on a logarithmic scale; None without any."""
        return min(self.at, key=lambda at: _distance(at, (chunk, context)), default=None)


def kernel_times(rows: Iterable[Measurement], heads: Mapping[str, int], *, busy_ranks: int) -> list[KernelTime]:
    """The attention rows of `heads` (heads, kv_heads, head_dim) among `rows`."""
    return [
        KernelTime.of(row)
        for row in rows
        if row.op == Op.ATTENTION
        and row.busy_ranks == busy_ranks
        and all(row.shape.get(name, 0) == size for name, size in heads.items())
    ]


def _at_context(us: Mapping[int, float], context: int) -> float:
    contexts = sorted(us)
    if len(contexts) > 1 and context > contexts[-1]:
        before, last = contexts[-2:]
        return us[last] + max(us[last] - us[before], 0.0) / (last - before) * (context - last)
    return float(np.interp(context, contexts, [us[at] for at in contexts]))


def _distance(at: tuple[int, int], other: tuple[int, int]) -> float:
    # Contexts shorter than a chunk's own tokens hardly differ from none.
    return sum(abs(math.log((a + 64) / (b + 64))) for a, b in zip(at, other, strict=True))

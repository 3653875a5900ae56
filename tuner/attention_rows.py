"""Attention rows of one rank's heads: which kernel each point runs in, and the curve through those that are run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from db.measurements import Measurement
from profiler.attention import PREFERENCE, AttentionKernel
from profiler.kernel_choice import KernelChoice, KernelTime
from tuner.attention_fit import AttentionCurve, Waves, fit_attention
from tuner.rows import RankWork, expected_s

IN_WAVES = (AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH)


class AttentionRows:
    """Rows of all kernels; `chosen` are those of the kernel that the runtime takes at each point."""

    def __init__(self, rows: Sequence[Measurement], work: RankWork) -> None:
        self.work = work
        self.chosen = chosen_kernels(rows)
        choose, longest = kernel_choice(rows), max(row.shape["context"] for row in rows)
        self.kernel_of = {chunk: choose(chunk, longest) for chunk in {row.shape["chunk"] for row in rows}}
        others = max((chunk for chunk, kernel in self.kernel_of.items() if kernel not in IN_WAVES), default=0)
        self.waves = Waves(
            num_heads=work.attention_sizes["heads"],
            num_multiprocessors=work.num_multiprocessors,
            first_chunk=min((chunk for chunk in self.kernel_of if chunk > others), default=math.inf),
        )

    def fit(self, rows: Sequence[Measurement]) -> AttentionCurve:
        """The curve through some of the chosen rows."""
        return fit_attention(
            [row.shape["chunk"] for row in rows],
            [row.shape["context"] for row in rows],
            [expected_s(row, ranks=self.work.tp_size) for row in rows],
            kernel_of=lambda chunk: self.kernel_of[chunk],
            waves=self.waves,
        )


def kernel_choice(rows: Iterable[Measurement], kernels: Sequence[AttentionKernel] = PREFERENCE) -> KernelChoice:
    """The choice that attention rows of one rank's heads lead to, among `kernels`, the usual one first.

    Raises `ValueError` for no kernels at all.
    """
    found = [row for row in _bounded(rows) if AttentionKernel(row.variant) in kernels]
    measured = {AttentionKernel(row.variant) for row in found}
    return KernelChoice(map(KernelTime.of, found), default=min(measured or kernels, key=list(kernels).index))


def chosen_kernels(rows: Iterable[Measurement]) -> list[Measurement]:
    """Of attention rows that differ in their kernel alone, that of the kernel which the runtime takes there."""
    by_shape: dict[tuple[tuple[str, int], ...], dict[AttentionKernel, Measurement]] = {}
    rows = _bounded(rows)
    for row in rows:
        by_shape.setdefault(tuple(sorted(row.shape.items())), {})[AttentionKernel(row.variant)] = row
    choose = kernel_choice(rows)
    chosen = []
    for variants in by_shape.values():
        some = next(iter(variants.values()))
        fastest = min(variants.values(), key=lambda row: row.median_us)
        chosen.append(variants.get(choose(some.shape["chunk"], some.shape["context"]), fastest))
    return chosen


def _bounded(rows: Iterable[Measurement]) -> list[Measurement]:
    """Without `sdpa` where rows of a CPU's own kernels stand beside it: its dense mask has no bound in memory."""
    rows = list(rows)
    on_cpu = any(row.variant in (AttentionKernel.CPU_FOLDED, AttentionKernel.CPU_FLASH) for row in rows)
    return [row for row in rows if not on_cpu or row.variant != AttentionKernel.SDPA]

"""The attention kernel chosen from measured rows: one rule shared by the fit and the runtime. Does not need SciPy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import PREFERENCE, AttentionKernel
from profiler.points.kernel_choice import KernelChoice, KernelTime


def kernel_choice(rows: Iterable[Measurement], kernels: Sequence[AttentionKernel] = PREFERENCE) -> KernelChoice:
    """The kernel choice from attention rows of one rank's heads, among `kernels`, of which the first is the default.

    Where one call of an engine was measured and only two are at hand, these stand in for it.
    Raises `ValueError` for no kernels at all.
    """
    rows = list(rows)
    usable = [row for row in rows if AttentionKernel(row.variant) in kernels]
    one_call, two_calls = AttentionKernel.CUDNN_GRAPH, AttentionKernel.CUDNN
    if one_call not in kernels and two_calls in kernels and all(row.variant != two_calls for row in usable):
        usable += [replace(row, variant=two_calls.value) for row in rows if row.variant == one_call]
    found = _bounded(usable)
    measured = {AttentionKernel(row.variant) for row in found}
    return KernelChoice(map(KernelTime.of, found), default=min(measured or kernels, key=list(kernels).index))


def chosen_kernels(rows: Iterable[Measurement]) -> list[Measurement]:
    """Of attention rows that differ only in their kernel, the row of the kernel that the runtime chooses."""
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
    """Without kernels that rows of a better one of their kind stand beside.

    On a CPU that is `sdpa`, whose dense mask has no bound in memory; on a card two calls of the engine that one does.
    """
    rows = list(rows)
    variants = {row.variant for row in rows}
    needless = set()
    if variants & {AttentionKernel.CPU_FOLDED, AttentionKernel.CPU_FLASH}:
        needless.add(AttentionKernel.SDPA)
    if AttentionKernel.CUDNN_GRAPH in variants:
        needless.add(AttentionKernel.CUDNN)
    return [row for row in rows if row.variant not in needless]

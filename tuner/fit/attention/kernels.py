"""The attention kernel chosen from measured rows: one rule, by which the fit predicts and the plan names kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import PREFERENCE, AttentionKernel
from profiler.points.kernel_choice import KernelChoice, KernelTime
from profiler.sequence.cut import cut_round
from profiler.sequence.kind import SequenceCut, SPKind
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Plan


def kernel_choice(rows: Iterable[Measurement]) -> KernelChoice:
    """The kernel choice from attention rows of one rank's heads; the usual best kernel measured is the default.

    Raises `ValueError` for no rows at all.
    """
    found = _bounded(rows)
    measured = {AttentionKernel(row.variant) for row in found}
    return KernelChoice(map(KernelTime.of, found), default=min(measured, key=PREFERENCE.index))


def with_kernels(plan: Plan, choose: KernelChoice) -> Plan:
    """The plan with the kernel of each piece that its ranks attend with.

    Ranks attend with pieces of a chunk where they gather its keys and values, and with whole chunks elsewhere.
    """
    parallel, others = plan.parallel, defaultdict[AttentionKernel, set[tuple[int, int]]](set)
    for chunks, cut in zip(plan.rounds, plan.round_cuts, strict=True):
        pieces_cut = cut if parallel.sp_kind is SPKind.GATHER else SequenceCut.WHOLE
        for share in cut_round([chunk.tokens for chunk in chunks], pieces_cut, parallel.sequence_size):
            for piece in share:
                at = piece.tokens, chunks[piece.chunk].start + piece.start
                others[choose(*at)].add(at)
    others.pop(choose.default, None)
    listed = {kernel: tuple(sorted(pieces)) for kernel, pieces in sorted(others.items())}
    return replace(plan, attention_kernels=AttentionKernels(usual=choose.default, others=listed))


def chosen_kernels(rows: Iterable[Measurement], choose: KernelChoice) -> list[Measurement]:
    """Of attention rows that differ only in their kernel, the row of the kernel that the runtime chooses."""
    by_shape: dict[tuple[tuple[str, int], ...], dict[AttentionKernel, Measurement]] = {}
    for row in _bounded(rows):
        by_shape.setdefault(tuple(sorted(row.shape.items())), {})[AttentionKernel(row.variant)] = row
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

"""Attention rows of one rank's heads: the kernel chosen at each point, and the curve through the chosen rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from tuner.fit.attention.curve import AttentionCurve, Waves, fit_attention
from tuner.fit.attention.kernels import chosen_kernels, kernel_choice
from tuner.fit.attention.window import WindowCurve, fit_window
from tuner.fit.rows import RankWork, Rows, expected_s

MOST_SPLIT = 1024  # chunks beyond it fill a card whatever the kernel
IN_WAVES = (AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH, AttentionKernel.FLASH3)


class AttentionRows:
    """Rows of all kernels; `chosen` are those of the kernel that the runtime takes at each point."""

    def __init__(self, rows: Sequence[Measurement], work: RankWork) -> None:
        self.work = work
        self.choose, longest = kernel_choice(rows), max(row.shape["context"] for row in rows)
        self.kernel_of = {chunk: self.choose(chunk, longest) for chunk in {row.shape["chunk"] for row in rows}}
        any_in_waves = any(kernel in IN_WAVES for kernel in self.kernel_of.values())
        others = [chunk for chunk, kernel in self.kernel_of.items() if kernel not in IN_WAVES]
        if any_in_waves:  # where a small chunk was measured in one kernel alone, larger ones tell what runs it
            others = [chunk for chunk in others if chunk <= MOST_SPLIT]
        self.waves = Waves(
            num_heads=rows[0].shape["heads"],  # that were measured: rows of more heads may stand for the rank's
            num_multiprocessors=work.num_multiprocessors if any_in_waves else None,
            split_up_to=max(others, default=0),
        )
        # The kernel that splits the context packs the heads of a group around a single row: no measure for several.
        fewest = 2 if any_in_waves and len(self.kernel_of) > 2 else 1
        self.chosen = [row for row in chosen_kernels(rows, self.choose) if row.shape["chunk"] >= fewest]

    def fit(self, rows: Sequence[Measurement]) -> AttentionCurve | WindowCurve:
        """Fit a curve to some of the chosen rows."""
        window = self.work.layer.window
        if window is not None:
            longest = self.work.longest_prompt or max(row.shape["context"] + row.shape["chunk"] for row in rows)
            return fit_window(rows, window, longest=longest, ranks=self.work.stage_size)
        return fit_attention(
            [row.shape["chunk"] for row in rows],
            [row.shape["context"] for row in rows],
            [expected_s(row, ranks=self.work.stage_size) for row in rows],
            kernel_of=lambda chunk: self.kernel_of[chunk],
            waves=self.waves,
        )


def attention_rows(rows: Rows, work: RankWork, *, busy_ranks: int) -> list[Measurement]:
    """Attention rows of the heads that a rank attends with.

    Where heads are cut for attention alone and so many were not measured, rows of the next larger number stand for
    them, in proportion: blocks of work go by heads.
    """
    sizes = work.attention_sizes
    found = rows.select("attention", sizes, busy_ranks=busy_ranks, variant=None)
    if found or work.attending_size == work.tp_size:
        return found
    same_dim = rows.select("attention", {"head_dim": sizes["head_dim"]}, busy_ranks=busy_ranks, variant=None)
    more = {(row.shape["heads"], row.shape["kv_heads"]) for row in same_dim if row.shape["heads"] >= sizes["heads"]}
    if not more:
        return []
    heads, kv_heads = min(more)
    measured = sizes | {"heads": heads, "kv_heads": kv_heads}
    share = sizes["heads"] / heads
    return [_scaled(row, share) for row in rows.select("attention", measured, busy_ranks=busy_ranks, variant=None)]


def require_attention(rows: Rows, work: RankWork, *, busy_ranks: int, why: str) -> list[Measurement]:
    """As `attention_rows`, but raises `UserError` that says what to measure when there are none."""
    found = attention_rows(rows, work, busy_ranks=busy_ranks)
    return found or rows.require("attention", work.attention_sizes, busy_ranks=busy_ranks, variant=None, why=why)


def _scaled(row: Measurement, share: float) -> Measurement:
    """The row with a share of its time; its heads stay those that were measured, for so they filled the card."""
    times = {name: share * getattr(row, name) for name in ("median_us", "p10_us", "p90_us", "min_us", "std_us")}
    return replace(row, **times)

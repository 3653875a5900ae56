"""Attention rows of one rank's heads: which kernel each point runs in, and the curve through those that are run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from tuner.fit.attention_fit import AttentionCurve, Waves, fit_attention
from tuner.fit.kernels import chosen_kernels, kernel_choice
from tuner.fit.rows import RankWork, expected_s

IN_WAVES = (AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH)


class AttentionRows:
    """Rows of all kernels; `chosen` are those of the kernel that the runtime takes at each point."""

    def __init__(self, rows: Sequence[Measurement], work: RankWork) -> None:
        self.work = work
        choose, longest = kernel_choice(rows), max(row.shape["context"] for row in rows)
        self.kernel_of = {chunk: choose(chunk, longest) for chunk in {row.shape["chunk"] for row in rows}}
        any_in_waves = any(kernel in IN_WAVES for kernel in self.kernel_of.values())
        others = list(takewhile(lambda chunk: self.kernel_of[chunk] not in IN_WAVES, sorted(self.kernel_of)))
        self.waves = Waves(
            num_heads=work.attention_sizes["heads"],
            num_multiprocessors=work.num_multiprocessors if any_in_waves else None,
            split_up_to=max(others, default=0),
        )
        # The kernel that splits the context packs the heads of a group around a single row: no measure for several.
        fewest = 2 if any_in_waves and len(others) > 1 else 1
        self.chosen = [row for row in chosen_kernels(rows) if row.shape["chunk"] >= fewest]

    def fit(self, rows: Sequence[Measurement]) -> AttentionCurve:
        """The curve through some of the chosen rows."""
        return fit_attention(
            [row.shape["chunk"] for row in rows],
            [row.shape["context"] for row in rows],
            [expected_s(row, ranks=self.work.tp_size) for row in rows],
            kernel_of=lambda chunk: self.kernel_of[chunk],
            waves=self.waves,
        )

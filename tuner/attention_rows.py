"""Attention rows of one rank's heads: which kernel each point runs in, and the curve through those that are run."""

from __future__ import annotations

from collections.abc import Sequence

from db.measurements import Measurement
from profiler.attention import AttentionKernel
from tuner.attention_fit import AttentionCurve, Waves, fit_attention
from tuner.kernels import chosen_kernels, kernel_choice
from tuner.rows import RankWork, expected_s

IN_WAVES = (AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH)


class AttentionRows:
    """Rows of all kernels; `chosen` are those of the kernel that the runtime takes at each point."""

    def __init__(self, rows: Sequence[Measurement], work: RankWork) -> None:
        self.work = work
        choose, longest = kernel_choice(rows), max(row.shape["context"] for row in rows)
        self.kernel_of = {chunk: choose(chunk, longest) for chunk in {row.shape["chunk"] for row in rows}}
        others = [chunk for chunk, kernel in self.kernel_of.items() if kernel not in IN_WAVES]
        any_in_waves = len(others) < len(self.kernel_of)
        self.waves = Waves(
            num_heads=work.attention_sizes["heads"],
            num_multiprocessors=work.num_multiprocessors if any_in_waves else None,
            split_up_to=max(others, default=0),
        )
        # A single row packs the heads of a group into one block: no measure for chunks of several.
        fewest = 2 if self.waves.num_multiprocessors and len(self.kernel_of) > 1 else 1
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

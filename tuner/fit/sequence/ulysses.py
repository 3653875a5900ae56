"""Rows are cut but for attention, around which an all-to-all cuts the heads: KV stays with the rank of its heads.

The parts' attention is that of the heads of a rank.
"""

from __future__ import annotations

from profiler.points.point import Op
from tuner.fit.curve import Floats
from tuner.fit.sequence.cut_costs import RowCosts, UncutCosts


class Ulysses(RowCosts):
    """An all-to-all of queries, keys and values before attention, one of its result after it: both waited for."""

    def compute_s(self, tokens: Floats) -> Floats:
        """The rank's rows, which are sorted by rank before each all-to-all and put together after it: q|k|v are copied
        three times, the result twice."""
        parts = self.parts
        moved = 6 * parts.row_bytes.ulysses_in + 4 * parts.row_bytes.attended
        return super().compute_s(tokens) + parts.moved_s(parts.rows(tokens), moved)

    def sent_s(self, tokens: Floats) -> Floats:
        """Both all-to-alls of a rank's rows; sums over the TP group."""
        parts, rows = self.parts, self.parts.rows(tokens)
        there_s = parts.message_s(Op.ALL_TO_ALL, rows * parts.row_bytes.ulysses_in)
        back_s = parts.message_s(Op.ALL_TO_ALL, rows * parts.row_bytes.attended)
        return super().sent_s(tokens) + there_s + back_s

    def base_s(self, chunk: Floats) -> Floats:
        """The whole chunk with a share of the heads."""
        return self.parts.base_s(chunk)

    def slope_s(self, chunk: Floats) -> Floats:
        """The whole chunk with a share of the heads."""
        return self.parts.slope_s(chunk)


class UlyssesWhole(UncutCosts):
    """All rows on every rank, attention with its own heads: what they give is gathered from all ranks."""

    def sent_s(self, tokens: Floats) -> Floats:
        """The gather of all heads; sums over the TP group."""
        gather_s = self.parts.message_s(Op.ALL_GATHER, tokens * self.parts.row_bytes.attended)
        return super().sent_s(tokens) + gather_s

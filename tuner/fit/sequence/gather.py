"""Rows are cut, the round's new keys and values gathered: each rank attends with its queries to all of them."""

from __future__ import annotations

from profiler.points.point import Op
from tuner.fit.curve import Floats
from tuner.fit.sequence.cut_costs import ContiguousAttention, RowCosts, ZigzagAttention


class GatherRows(RowCosts):
    """The gather goes beside the projection to queries; what that does not hide is waited for."""

    def compute_s(self, tokens: Floats) -> Floats:
        """The rank's rows; all ranks' keys and values go from where they were gathered to the slab, and what the pieces
        of attention give is put together."""
        parts, rows = self.parts, self.parts.rows(tokens)
        moved = 2 * parts.size * parts.row_bytes.kv + 2 * parts.row_bytes.attended
        return super().compute_s(tokens) + parts.moved_s(rows, moved)

    def sent_s(self, tokens: Floats) -> Floats:
        """Keys and values of the whole round, each rank's padded to the largest share; sums over the TP group."""
        parts, rows = self.parts, self.parts.rows(tokens)
        gather_s = parts.message_s(Op.ALL_GATHER, parts.size * rows * parts.row_bytes.kv)
        return super().sent_s(tokens) + parts.gather_overlap.exposed(parts.queries_s(rows), gather_s)


class GatherZigzag(ZigzagAttention, GatherRows):
    """In zigzag: every rank attends to as many pairs."""


class GatherContiguous(ContiguousAttention, GatherRows):
    """In one run of rows: fewer, larger pieces, of which the last costs most."""

"""Rows are cut, and KV with them: keys and values go around the ranks, each attends to what it has at the time.

In g steps a rank meets the part of every rank; in g - 1 of them the next part is on its way. A part holds a g-th of the
context and of the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profiler.points.point import Op
from tuner.fit.curve import Floats
from tuner.fit.sequence.cut_costs import CutCosts, RowCosts
from tuner.fit.sequence.gather import GatherContiguous, GatherZigzag
from tuner.fit.sequence.parts import LayerParts

_LARGE_BYTES = 2.0**30  # where a message's time is that of its bytes
_MANY_ROWS = 2.0**17  # the same of a copy


class Ring(RowCosts):
    """Attention beside the messages that carry what it needs next.

    Its pairs are those of a gather in the same cut: whoever waits for the slowest rank in every step attends to as many
    in all.
    """

    pairs_of: type[CutCosts]

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.pairs = self.pairs_of(parts)
        self.calls_a_chunk = parts.size * self.pairs.calls_a_chunk

    def compute_s(self, tokens: Floats) -> Floats:
        """The rank's rows, g - 1 merges of their partial attention (by log-sum-exp), and what goes around put together.

        A merge reads two results and writes one; sums that another merge follows are in float32.
        """
        parts, rows = self.parts, self.parts.rows(tokens)
        sizes = parts.row_bytes
        merged = (parts.size + 1) * sizes.attended + 2 * (parts.size - 2) * sizes.attended_float32
        return super().compute_s(tokens) + parts.moved_s(rows, merged + 2 * sizes.kv)

    def sent_s(self, tokens: Floats) -> Floats:
        """Latencies of g - 1 messages; their bytes count beside the attention of each chunk."""
        return super().sent_s(tokens) + (self.parts.size - 1) * self._message_s(0.0)

    def base_s(self, chunk: Floats) -> Floats:
        """The chunk's pairs, and a kernel's shortest time for each further step; beside it the chunk goes around."""
        attention_s = self.pairs.base_s(chunk) + (self.parts.size - 1) * self.parts.base_s(np.ones_like(chunk))
        return self.parts.overlap.together(attention_s, chunk * self._passed_token_s)

    def slope_s(self, chunk: Floats) -> Floats:
        """The chunk's pairs with a token of context, which is copied to where it is sent from and goes around."""
        passed_s = np.full_like(chunk, self._passed_token_s)
        return self.parts.overlap.together(self.pairs.slope_s(chunk), passed_s) + self._copied_token_s

    def least_base_s(self, chunk: Floats) -> Floats:
        """See `CutCosts`."""
        return self.parts.overlap.together(self.pairs.least_base_s(chunk), chunk * self._passed_token_s)

    def least_slope_s(self, chunk: Floats) -> Floats:
        """See `CutCosts`."""
        passed_s = np.full_like(chunk, self._passed_token_s)
        return self.parts.overlap.together(self.pairs.least_slope_s(chunk), passed_s) + self._copied_token_s

    def share_of_sum(self, chunk: Sequence[int], context: Sequence[int]) -> float:
        """See `CutCosts`: as the pairs are shared."""
        return self.pairs.share_of_sum(chunk, context)

    @property
    def _copied_token_s(self) -> float:
        """A g-th of a token's keys and values, put where they are sent from."""
        parts = self.parts
        copied_s = parts.moved_s(np.full(1, _MANY_ROWS), 2 * parts.row_bytes.kv)
        return float(copied_s[0]) / _MANY_ROWS / parts.size

    @property
    def _passed_token_s(self) -> float:
        """Sending a g-th of a token's keys and values g - 1 times."""
        parts = self.parts
        byte_s = (self._message_s(_LARGE_BYTES) - self._message_s(0.0)) / _LARGE_BYTES
        return (parts.size - 1) / parts.size * parts.row_bytes.kv * byte_s

    def _message_s(self, size_bytes: float) -> float:
        return float(self.parts.messages[Op.SEND_RECV](np.full(1, size_bytes))[0])


class RingZigzag(Ring):
    """In zigzag: every rank has as many pairs in every step."""

    pairs_of = GatherZigzag


class RingContiguous(Ring):
    """In one run of rows: the last rank has most pairs, and the others wait for it in every step."""

    pairs_of = GatherContiguous

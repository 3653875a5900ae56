"""The cost of a layer on a rank for a given cut of the round; here for rounds that are not cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from profiler.points.point import Op
from profiler.sequence.cut import cut_round
from profiler.sequence.kind import SequenceCut
from tuner.fit.curve import Floats
from tuner.fit.sequence.parts import LayerParts


class CutCosts(ABC):
    """Seconds of a layer on the slowest rank of a group that cuts rounds in one way.

    Of the form that the planner and its bound read: tokens_s(tokens of the round), and for each chunk of it
    base_s(chunk) + slope_s(chunk) * context. No part falls with more tokens.
    """

    calls_a_chunk = 1
    """Pieces of a chunk that a rank attends to one by one."""
    cuts_rows = True
    """Whether each rank has rows of its own."""

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts

    def tokens_s(self, tokens: Floats) -> Floats:
        """Token-wise work and what is sent beside or after it, for rounds of so many tokens."""
        return self.compute_s(tokens) + self.sent_s(tokens) + self.exchange_s(tokens)

    def exchange_s(self, tokens: Floats) -> Floats:
        """Experts that rows are sent to: their choices, the rows there and back, how many told before; or their sum."""
        parts, exchange = self.parts, self.parts.exchange
        if exchange is None:
            return np.zeros_like(tokens)
        seconds = exchange.experts_s(tokens)
        if not self.cuts_rows:
            beside = exchange.is_beside
            return seconds + (parts.message_s(Op.ALL_REDUCE, tokens * parts.row_bytes.hidden) if beside else 0.0)
        told = np.full_like(tokens, 8.0 * parts.size)
        for size_bytes in (told, *(tokens * size for size in (exchange.choice_bytes, *(exchange.row_bytes,) * 2))):
            seconds = seconds + parts.message_s(Op.ALL_TO_ALL, size_bytes)
        return seconds

    @abstractmethod
    def compute_s(self, tokens: Floats) -> Floats:
        """Token-wise work alone."""

    @abstractmethod
    def sent_s(self, tokens: Floats) -> Floats:
        """What messages add to it."""

    @abstractmethod
    def base_s(self, chunk: Floats) -> Floats:
        """Attention of chunks to themselves."""

    @abstractmethod
    def slope_s(self, chunk: Floats) -> Floats:
        """What each token of context adds."""

    def least_base_s(self, chunk: Floats) -> Floats:
        """What a chunk adds to its round's attention at least, whatever else the round holds; `chunk` rises."""
        return self.base_s(chunk)

    def least_slope_s(self, chunk: Floats) -> Floats:
        """The same of each token of context."""
        return self.slope_s(chunk)

    def share_of_sum(self, chunk: Sequence[int], context: Sequence[int]) -> float:
        """Attention of one round's chunks over the sum of theirs: 1 unless ranks attend to different chunks."""
        return 1.0


class UncutCosts(CutCosts):
    """Every rank runs all rows: nothing is sent but what tensor parallelism sums."""

    cuts_rows = False

    def compute_s(self, tokens: Floats) -> Floats:
        """All rows."""
        return self.parts.token_wise_s(tokens)

    def sent_s(self, tokens: Floats) -> Floats:
        """Sums over the tensor-parallel group."""
        return self.parts.reduce_s(tokens)

    def base_s(self, chunk: Floats) -> Floats:
        """As measured."""
        return self.parts.base_s(chunk)

    def slope_s(self, chunk: Floats) -> Floats:
        """As measured."""
        return self.parts.slope_s(chunk)


class RowCosts(CutCosts):
    """Token-wise work on a rank's own rows, and sums over its tensor-parallel group for them."""

    def compute_s(self, tokens: Floats) -> Floats:
        """The rank's rows."""
        return self.parts.token_wise_s(self.parts.rows(tokens))

    def sent_s(self, tokens: Floats) -> Floats:
        """Sums over the tensor-parallel group."""
        return self.parts.reduce_s(self.parts.rows(tokens))


class ZigzagAttention(CutCosts):
    """Two blocks b = c / 2g of each chunk, r and 2g - 1 - r: before them lie (2g - 1) b tokens of it in all."""

    calls_a_chunk = 2

    def block(self, chunk: Floats) -> Floats:
        """Tokens of a block."""
        return chunk / (2 * self.parts.size)

    def base_s(self, chunk: Floats) -> Floats:
        """Two blocks to themselves and to those before them: alike on every rank."""
        block, parts = self.block(chunk), self.parts
        return 2 * parts.base_s(block) + parts.slope_s(block) * (2 * parts.size - 1) * block

    def slope_s(self, chunk: Floats) -> Floats:
        """Two blocks."""
        return 2 * self.parts.slope_s(self.block(chunk))


class ContiguousAttention(CutCosts):
    """A run of the packed rows: of one chunk the last rank has the last g-th, after all the others."""

    def base_s(self, chunk: Floats) -> Floats:
        """The last piece to itself and to the pieces before it."""
        piece, parts = chunk / self.parts.size, self.parts
        return parts.base_s(piece) + parts.slope_s(piece) * (parts.size - 1) * piece

    def slope_s(self, chunk: Floats) -> Floats:
        """One piece."""
        return self.parts.slope_s(chunk / self.parts.size)

    def least_base_s(self, chunk: Floats) -> Floats:
        """See `CutCosts`: a g-th of the chunk's pairs, c^2 / 2, at the least that a pair costs in any piece of it."""
        parts = self.parts
        pair_s = np.minimum(parts.base_s(chunk) / (chunk**2 / 2), parts.slope_s(chunk) / chunk)
        return np.minimum.accumulate(pair_s) * chunk**2 / 2 / parts.size

    def least_slope_s(self, chunk: Floats) -> Floats:
        """See `CutCosts`: the chunk's tokens at the least that a pair costs."""
        return np.minimum.accumulate(self.parts.slope_s(chunk) / chunk) * chunk / self.parts.size

    def share_of_sum(self, chunk: Sequence[int], context: Sequence[int]) -> float:
        """See `CutCosts`: the rank with most to attend to. Ranks with chunks of their own are quicker than the sum of
        every chunk's last piece, unless one chunk has far more context than the others."""
        if len(chunk) == 1:
            return 1.0
        tokens, before = np.array(chunk, dtype=np.float64), np.array(context, dtype=np.float64)
        all_s = float((self.base_s(tokens) + self.slope_s(tokens) * before).sum())
        return self._slowest_s(chunk, context) / all_s

    def _slowest_s(self, chunk: Sequence[int], context: Sequence[int]) -> float:
        slowest = 0.0
        for share in cut_round(chunk, SequenceCut.CONTIGUOUS, self.parts.size):
            tokens = np.array([piece.tokens for piece in share], dtype=np.float64)
            before = np.array([context[piece.chunk] + piece.start for piece in share], dtype=np.float64)
            slowest = max(slowest, float((self.parts.base_s(tokens) + self.parts.slope_s(tokens) * before).sum()))
        return slowest

"""Divides the rows of a round among the ranks of a group; used by every rank and by the planner.

Zigzag: Megatron-LM and SGLang cut so. Rank r of g takes blocks r and 2g - 1 - r of each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from profiler.sequence.kind import SequenceCut


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive tokens of one chunk of a round, run by one rank."""

    chunk: int  # index in the round
    start: int  # first token within the chunk
    tokens: int

    @property
    def end(self) -> int:
        """The chunk's token after the piece's last."""
        return self.start + self.tokens


Share = tuple[Piece, ...]
"""What one rank runs of a round, in the order in which its rows are packed: by chunk, then by place."""


def cut_round(chunk_tokens: Sequence[int], cut: SequenceCut, size: int) -> tuple[Share, ...]:
    """The share of each of `size` ranks of a round whose chunks have `chunk_tokens`; shares may be empty."""
    if cut is SequenceCut.WHOLE:
        whole = tuple(Piece(chunk=index, start=0, tokens=count) for index, count in enumerate(chunk_tokens))
        return (whole,) * size
    if cut is SequenceCut.ZIGZAG:
        return tuple(tuple(_zigzag(chunk_tokens, rank, size)) for rank in range(size))
    rows = -(-sum(chunk_tokens) // size)
    return tuple(tuple(_rows(chunk_tokens, rank * rows, (rank + 1) * rows)) for rank in range(size))


def share_tokens(share: Share) -> int:
    """Tokens of a share."""
    return sum(piece.tokens for piece in share)


def rows_per_rank(chunk_tokens: Sequence[int], cut: SequenceCut, size: int) -> int:
    """Rows that every rank runs, its last ones padding where its share is smaller than another's."""
    if cut is SequenceCut.WHOLE:
        return sum(chunk_tokens)
    return max(map(share_tokens, cut_round(chunk_tokens, cut, size)))


def _zigzag(chunk_tokens: Sequence[int], rank: int, size: int) -> Iterator[Piece]:
    blocks = 2 * size
    for index, count in enumerate(chunk_tokens):
        for block in (rank, blocks - 1 - rank):
            start, end = count * block // blocks, count * (block + 1) // blocks
            if end > start:
                yield Piece(chunk=index, start=start, tokens=end - start)


def _rows(chunk_tokens: Sequence[int], first: int, after: int) -> Iterator[Piece]:
    """The pieces that lie in rows [first, after) of the packed round."""
    for index, (count, end) in enumerate(zip(chunk_tokens, accumulate(chunk_tokens), strict=True)):
        begin = end - count
        low, high = max(first, begin), min(after, end)
        if high > low:
            yield Piece(chunk=index, start=low - begin, tokens=high - low)

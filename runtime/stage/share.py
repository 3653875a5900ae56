"""The share of a round that one rank runs: its pieces of the chunks, and those of the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from profiler.sequence.cut import Piece, Share, cut_round, share_tokens
from profiler.sequence.kind import SequenceCut
from tuner.plan.plan import Chunk, Parallel, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundShare:
    """A round as one rank runs it: `num_rows` rows, the last of them padding where another rank has more tokens."""

    chunks: Round
    cut: SequenceCut
    shares: tuple[Share, ...]  # of all ranks that share the round's rows
    rank: int  # this one among them
    num_rows: int

    @classmethod
    def of(cls, chunks: Round, cut: SequenceCut, *, size: int, rank: int) -> RoundShare:
        """The share of rank `rank` of `size`."""
        shares = cut_round([chunk.tokens for chunk in chunks], cut, size)
        return cls(chunks=chunks, cut=cut, shares=shares, rank=rank, num_rows=max(map(share_tokens, shares)))

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole round."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def pieces(self) -> Share:
        """This rank's pieces, in packed order."""
        return self.shares[self.rank]

    @property
    def padding(self) -> int:
        """Rows of this rank after its tokens."""
        return self.num_rows - share_tokens(self.pieces)

    def token_ranges(self) -> Iterator[Chunk]:
        """This rank's pieces as chunks of their requests."""
        for piece in self.pieces:
            yield self.place(piece)

    def place(self, piece: Piece) -> Chunk:
        """A piece as a chunk of its request."""
        chunk = self.chunks[piece.chunk]
        return Chunk(chunk.request, chunk.start + piece.start, piece.tokens)

    def last_rows(self) -> dict[int, int | None]:
        """This rank's row of the last token of each chunk, by request in the round's order; None on other ranks."""
        rows: dict[int, int | None] = {chunk.request: None for chunk in self.chunks}
        for piece, end in zip(self.pieces, accumulate(piece.tokens for piece in self.pieces), strict=True):
            chunk = self.chunks[piece.chunk]
            if piece.end == chunk.tokens:
                rows[chunk.request] = end - 1
        return rows


def sharing_size(parallel: Parallel, cut: SequenceCut) -> int:
    """Ranks that share the rows of a round cut so."""
    return 1 if cut is SequenceCut.WHOLE else parallel.sequence_size

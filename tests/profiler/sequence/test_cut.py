"""Every row of a round is run by one rank, or by all; shares are even, and zigzag shares have even pairs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.model.whole.layer import seen_pairs
from profiler.sequence.cut import cut_round, rows_per_rank, share_tokens
from profiler.sequence.kind import SequenceCut

ROUNDS = st.lists(st.integers(1, 300), min_size=1, max_size=6)
CUT = [SequenceCut.CONTIGUOUS, SequenceCut.ZIGZAG]


@given(chunks=ROUNDS, cut=st.sampled_from(CUT), size=st.integers(1, 9))
def test_each_token_is_run_once(chunks: list[int], cut: SequenceCut, size: int) -> None:
    shares = cut_round(chunks, cut, size)
    run = sorted((piece.chunk, at) for share in shares for piece in share for at in range(piece.start, piece.end))
    assert run == [(index, at) for index, count in enumerate(chunks) for at in range(count)]
    most = rows_per_rank(chunks, cut, size)
    assert most == max(map(share_tokens, shares))
    slack = 2 * len(chunks) if cut is SequenceCut.ZIGZAG else 1
    assert most <= sum(chunks) / size + slack


@given(chunks=ROUNDS, size=st.integers(1, 9))
def test_whole_rounds_are_run_by_all(chunks: list[int], size: int) -> None:
    shares = cut_round(chunks, SequenceCut.WHOLE, size)
    assert len(shares) == size
    assert (
        {share_tokens(share) for share in shares} == {sum(chunks)} == {rows_per_rank(chunks, SequenceCut.WHOLE, size)}
    )


@given(chunks=ROUNDS, size=st.integers(1, 9))
def test_contiguous_shares_lie_in_the_order_of_ranks(chunks: list[int], size: int) -> None:
    shares = cut_round(chunks, SequenceCut.CONTIGUOUS, size)
    places = [(piece.chunk, piece.start) for share in shares for piece in share]
    assert places == sorted(places)
    rows = rows_per_rank(chunks, SequenceCut.CONTIGUOUS, size)
    # Only the last ranks have fewer: what is gathered has its padding at the end.
    counts = [share_tokens(share) for share in shares]
    full = [count for count in counts if count == rows]
    assert counts[: len(full)] == full and sum(1 for count in counts if 0 < count < rows) <= 1


@pytest.mark.parametrize("context", [0, 5000])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_zigzag_shares_have_as_many_pairs(size: int, context: int) -> None:
    tokens = 2 * size * 64

    def pairs(cut: SequenceCut) -> list[int]:
        shares = cut_round([tokens], cut, size)
        return [sum(seen_pairs(piece.tokens, context + piece.start) for piece in share) for share in shares]

    assert len(set(pairs(SequenceCut.ZIGZAG))) == 1
    assert max(pairs(SequenceCut.CONTIGUOUS)) > min(pairs(SequenceCut.CONTIGUOUS))

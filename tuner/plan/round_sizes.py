"""Sizes of a plan's rounds on one rank, given how they are cut among a sequence-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from profiler.sequence.cut import cut_round, rows_per_rank, share_tokens
from profiler.sequence.kind import SequenceCut, SPKind, round_cuts, usual_cut
from tuner.plan.kv_rows import assign_rows
from tuner.plan.plan import Parallel, Request, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSizes:
    """How much a rank holds of a plan's rounds at once, in tokens."""

    slab_rows: int
    """Rows of its KV slab, new tokens included."""
    most_tokens: int
    """Of the largest round."""
    most_rows: int
    """Rows that it runs of a round at most."""
    all_rows: int
    """Rows that it runs of all rounds."""
    most_passed: int
    """Tokens whose KV goes around the ranks in a round, context and new ones, at most."""
    num_rounds: int
    num_requests: int = 1

    @classmethod
    def of(
        cls,
        parallel: Parallel,
        requests: Sequence[Request],
        rounds: Sequence[Round],
        *,
        cuts: Sequence[SequenceCut] = (),
        max_new_tokens: int,
    ) -> Self:
        """The sizes of these rounds in their cuts; left out, the usual one of the kind."""
        size, cuts = parallel.sequence_size, round_cuts(parallel.sp_kind, tuple(cuts), len(rounds))
        tokens = [[chunk.tokens for chunk in chunks] for chunks in rounds]
        rows = [rows_per_rank(chunks, cut, size) for chunks, cut in zip(tokens, cuts, strict=True)]
        slab_rows = assign_rows(requests, rounds, max_new_tokens=max_new_tokens).total
        if parallel.sp_kind is SPKind.RING:
            kept = _kept_tokens(requests, rounds, cuts, size)
            # And a row for what another rank keeps.
            slab_rows = assign_rows(requests, rounds, max_new_tokens=max_new_tokens, kept_tokens=kept).total + 1
        return cls(
            slab_rows=slab_rows,
            most_tokens=max(map(sum, tokens)),
            most_rows=max(rows),
            all_rows=sum(rows),
            most_passed=max(sum(chunk.end for chunk in chunks) for chunks in rounds),
            num_rounds=len(rounds),
            num_requests=len(requests),
        )

    @classmethod
    def of_limits(
        cls, parallel: Parallel, *, most_tokens: int, slab_rows: int, new_tokens: int, most_passed: int
    ) -> Self:
        """Of rounds that are only known by their limits: as few as hold all new tokens, in the usual cut of the kind.

        slab_rows: of a rank that keeps all tokens; most_passed: of the longest prompt.
        """
        size = parallel.sequence_size
        rows = rows_per_rank([most_tokens], usual_cut(parallel.sp_kind), size)
        num_rounds = -(-new_tokens // most_tokens)
        if parallel.sp_kind is SPKind.RING:
            slab_rows = -(-slab_rows // size) + 1
        return cls(
            slab_rows=slab_rows,
            most_tokens=most_tokens,
            most_rows=rows,
            all_rows=num_rounds * rows,
            most_passed=most_passed + most_tokens,
            num_rounds=num_rounds,
        )


def _kept_tokens(
    requests: Sequence[Request], rounds: Sequence[Round], cuts: Sequence[SequenceCut], size: int
) -> list[int]:
    """Prompt tokens of each request on the rank that keeps most of it, where KV is cut with the rows."""
    kept = [[0] * size for _ in requests]
    most = max(sum(chunk.tokens for chunk in chunks) for chunks in rounds)
    for index, request in enumerate(requests):
        for start in range(0, request.cached_tokens, most):
            tokens = min(most, request.cached_tokens - start)
            for rank, share in enumerate(cut_round([tokens], usual_cut(SPKind.RING), size)):
                kept[index][rank] += share_tokens(share)
    for chunks, cut in zip(rounds, cuts, strict=True):
        for rank, share in enumerate(cut_round([chunk.tokens for chunk in chunks], cut, size)):
            for piece in share:
                kept[chunks[piece.chunk].request][rank] += piece.tokens
    return list(map(max, kept))

"""The kinds of sequence parallelism, and the ways in which each can cut a round."""

from __future__ import annotations

from enum import StrEnum


class SPKind(StrEnum):
    """How a stage's ranks share the tokens of a round; all but `MEGATRON` take ranks of their own beside TP."""

    NONE = "none"
    GATHER = "gather"
    """Rows are cut; the round's new keys and values are gathered, so that each rank keeps all KV of its heads."""
    ULYSSES = "ulysses"
    """Rows are cut; around attention an all-to-all cuts the heads instead. KV is kept by heads."""
    RING = "ring"
    """Rows are cut, and KV with them; keys and values go around while each rank attends to what it has."""
    MEGATRON = "megatron"
    """The tensor-parallel group cuts norms and the residual stream by rows: all-gather and reduce-scatter instead of
    all-reduce."""


class SequenceCut(StrEnum):
    """Which rows of a round a rank of the group runs."""

    WHOLE = "whole"
    """All of them: each rank does the same token-wise work."""
    CONTIGUOUS = "contiguous"
    """One run of the packed rows."""
    ZIGZAG = "zigzag"
    """Of each chunk cut into twice as many blocks as ranks, one from its front and one from its back: each rank sees
    as many pairs of query and key."""


CUTS: dict[SPKind, tuple[SequenceCut, ...]] = {
    SPKind.NONE: (SequenceCut.WHOLE,),
    SPKind.GATHER: (SequenceCut.ZIGZAG, SequenceCut.CONTIGUOUS, SequenceCut.WHOLE),
    SPKind.ULYSSES: (SequenceCut.CONTIGUOUS, SequenceCut.WHOLE),
    SPKind.RING: (SequenceCut.ZIGZAG, SequenceCut.CONTIGUOUS),
    SPKind.MEGATRON: (SequenceCut.CONTIGUOUS, SequenceCut.WHOLE),
}
"""The cuts of each kind, the usual one first."""


def usual_cut(kind: SPKind) -> SequenceCut:
    """How rounds are cut where nothing else is said."""
    return CUTS[kind][0]


def round_cuts(kind: SPKind, cuts: tuple[SequenceCut, ...], num_rounds: int) -> tuple[SequenceCut, ...]:
    """The cut of each round: those given, or the usual one."""
    return cuts or (usual_cut(kind),) * num_rounds

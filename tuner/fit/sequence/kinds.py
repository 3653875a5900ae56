"""The costs of each kind of sequence parallelism in each of its cuts, and the collectives that they need."""

from __future__ import annotations

from profiler.points.point import Op
from profiler.sequence.kind import SequenceCut, SPKind
from tuner.fit.sequence.cut_costs import CutCosts, UncutCosts
from tuner.fit.sequence.gather import GatherContiguous, GatherZigzag
from tuner.fit.sequence.megatron import Megatron
from tuner.fit.sequence.ring import RingContiguous, RingZigzag
from tuner.fit.sequence.ulysses import Ulysses, UlyssesWhole

COSTS: dict[tuple[SPKind, SequenceCut], type[CutCosts]] = {
    (SPKind.NONE, SequenceCut.WHOLE): UncutCosts,
    (SPKind.GATHER, SequenceCut.ZIGZAG): GatherZigzag,
    (SPKind.GATHER, SequenceCut.CONTIGUOUS): GatherContiguous,
    (SPKind.GATHER, SequenceCut.WHOLE): UncutCosts,
    (SPKind.ULYSSES, SequenceCut.CONTIGUOUS): Ulysses,
    (SPKind.ULYSSES, SequenceCut.WHOLE): UlyssesWhole,
    (SPKind.RING, SequenceCut.ZIGZAG): RingZigzag,
    (SPKind.RING, SequenceCut.CONTIGUOUS): RingContiguous,
    (SPKind.MEGATRON, SequenceCut.CONTIGUOUS): Megatron,
    (SPKind.MEGATRON, SequenceCut.WHOLE): UncutCosts,
}

MESSAGES: dict[SPKind, tuple[Op, ...]] = {
    SPKind.NONE: (),
    SPKind.GATHER: (Op.ALL_GATHER,),
    SPKind.ULYSSES: (Op.ALL_TO_ALL, Op.ALL_GATHER),
    SPKind.RING: (Op.SEND_RECV,),
    SPKind.MEGATRON: (Op.ALL_GATHER, Op.REDUCE_SCATTER),
}
"""What moves between the ranks that share the rows."""

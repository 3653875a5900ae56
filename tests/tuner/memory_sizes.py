"""Layouts and sizes of rounds to count memory for."""

from __future__ import annotations

from tuner.plan.plan import Parallel
from tuner.plan.round_sizes import RoundSizes


def stages(*layer_partition: int, tp_size: int = 1) -> Parallel:
    """Stages of so many layers each."""
    return Parallel(tp_size=tp_size, pp_size=len(layer_partition), layer_partition=layer_partition)


def whole_rounds(slab_rows: int, most_tokens: int, all_tokens: int, num_rounds: int = 8) -> RoundSizes:
    """Rounds that no rank shares with another."""
    return RoundSizes(
        slab_rows=slab_rows,
        most_tokens=most_tokens,
        most_rows=most_tokens,
        all_rows=all_tokens,
        most_passed=0,
        num_rounds=num_rounds,
    )

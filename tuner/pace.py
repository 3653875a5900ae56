"""How long each rank takes beside the slowest: cards of one kind differ by several percent under load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from db.measurements import Measurement
from tuner.rows import expected_s

LEAST_LAYERS = 3  # of which the median counts: a card's clock swings by two percent


@dataclass(frozen=True, slots=True)
class Pace:
    """Rows tell the time of the slowest rank at each point; a stage takes that of its own slowest rank."""

    factors: tuple[float, ...] = ()
    """By rank: its time over that of the rows."""

    def of_stage(self, stage: int, tp_size: int) -> float:
        """Factor of a stage of `tp_size` ranks; 1 where one of them was not measured."""
        ranks = range(stage * tp_size, (stage + 1) * tp_size)
        return max(self.factors[rank] if rank < len(self.factors) else 1.0 for rank in ranks)


def fit_pace(layers: Sequence[Measurement], of_ranks: Sequence[Measurement]) -> Pace:
    """The median over whole layers of each rank's time over the layer's row.

    layers: `layer` rows. of_ranks: `rank_layer` rows of the same work; where no rank or few layers have any, nothing
    is known and all ranks are alike.
    """
    slowest_s = {(row.shape["chunk"], row.shape["context"]): expected_s(row) for row in layers}
    ratios: dict[int, list[float]] = defaultdict(list)
    for row in of_ranks:
        at = (row.shape["chunk"], row.shape["context"])
        if at in slowest_s:
            ratios[row.shape["rank"]].append(expected_s(row) / slowest_s[at])
    known = range(len(ratios))
    if any(len(ratios.get(rank, ())) < LEAST_LAYERS for rank in known):
        return Pace()
    return Pace(tuple(median(ratios[rank]) for rank in known))

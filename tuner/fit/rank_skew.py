"""Rank skew: each rank's time relative to the slowest; cards of one kind differ by several percent under load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from db.rows.measurements import Measurement
from tuner.fit.rows import expected_s

LEAST_LAYERS = 3  # of which the median counts: a card's clock swings by two percent


@dataclass(frozen=True, slots=True)
class RankSkew:
    """Rows tell the time of the slowest rank at each point; a stage takes that of its own slowest rank."""

    factors: tuple[float, ...] = ()
    """By rank: its time over that of the slowest, which has 1."""

    def of_stage(self, stage: int, stage_size: int) -> float:
        """Factor of a stage of `stage_size` ranks; 1 where one of them was not measured."""
        ranks = range(stage * stage_size, (stage + 1) * stage_size)
        return max(self.factors[rank] if rank < len(self.factors) else 1.0 for rank in ranks)


def fit_rank_skew(of_ranks: Sequence[Measurement]) -> RankSkew:
    """The median over whole layers of each rank's time over the slowest rank's, the slowest rank's own taken as 1.

    of_ranks: `rank_layer` rows of one work and load. Layers that not all ranks have do not count; where few are left,
    nothing is known and all ranks are alike.
    """
    layers: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in of_ranks:
        layers[row.shape["chunk"], row.shape["context"]][row.shape["rank"]] = expected_s(row)
    ranks = sorted({rank for times in layers.values() for rank in times})
    whole = [times for times in layers.values() if len(times) == len(ranks)]
    if len(whole) < LEAST_LAYERS or ranks != list(range(len(ranks))):
        return RankSkew()
    ratios = [median(times[rank] / max(times.values()) for times in whole) for rank in ranks]
    return RankSkew(tuple(ratio / max(ratios) for ratio in ratios))

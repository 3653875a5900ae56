"""What a decision costs requests to come: what they wait for work that is left over, and how they pass the pipeline.

While `V` seconds of work wait, requests arrive at a rate `a` and bring a load `r` (seconds of work a second), `V` falls
by 1 - r a second. All that arrive before it is gone wait for what is left of it: a V^2 / (2 (1 - r)) seconds in all.
That is the value function of the M/G/1 queue, without what any decision costs alike (Hyytia, Aalto, Penttinen and
Virtamo, "On the value function of the M/G/1 FCFS and LCFS queues", 2012). A rule that adds it to the cost of each of
its choices is one step of policy iteration: where its model holds it is no worse than the rule whose load `r` is.
Over a horizon `H` the same is a (V H - (1 - r) H^2 / 2) where work outlasts it; under overload it always does. By level
(`online.to_come.traffic`) `V` is the work that runs before it, and `a` and `r` count what does.

Until the pipeline runs empty, behind a long round shorter ones leave no sooner (`recurrence.timeline`): all that come
until then pass the K - 1 stages behind as slowly as the longest round that is in flight or decided on. Rounds up to the
steady pace (`online.to_come.steady_pace`), at which those to come are run anyway, cost them nothing. Longer ones pay
only where what they save over all that is expected until then is more: a momentary queue does not lengthen all that
follow.

Arrivals need not be Poisson's. Regular ones leave time until the next one: work done by then delays nobody. Of bursts,
a renewal process whose times between arrivals have the variation c^2, (c^2 - 1) / 2 more come soon after one has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from tuner.online.to_come.steady_pace import SteadyPace
from tuner.online.to_come.traffic import Levels, Traffic
from tuner.plan.stage_cost import Floats

LEAST_DRAIN = 1e-9


def _none() -> Floats:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Requests to come, seen from now; arrays by level."""

    rate: Floats = field(default_factory=_none)
    """Arrivals a second; none where none are expected."""
    load: Floats = field(default_factory=_none)
    """Seconds of work a second, cut nowhere, of the level and those before it."""
    ahead: Floats = field(default_factory=_none)
    """Share of the waiting work that runs before the level."""
    steady: SteadyPace = field(default_factory=SteadyPace)
    behind: float = 0.0
    """Times a round's seconds to pass the stages behind the first."""
    num_passing: float = 0.0
    """Requests that come before the pipeline runs empty, as far as they count."""
    horizon_s: float = 0.0
    spare_s: float = 0.0
    """Work that is surely done before the next one arrives."""
    at_once: float = 0.0
    """Requests that come at the start of what is left rather than during it: half of one if arrivals are regular, and
    those that will come soon because one has, by a renewal process' excess over Poisson's."""
    soon_s: float = 0.0
    """The work of the latter."""
    weight: float = 1.0
    """How much their waiting counts."""

    @classmethod
    def of(
        cls,
        traffic: Traffic,
        levels: Levels,
        steady: SteadyPace,
        now_s: float,
        *,
        before_s: Sequence[float],
        waiting_s: float,
        behind: float,
        weight: float = 1.0,
        passing: float = 1.0,
    ) -> Self:
        """The outlook at a time. before_s: work that waits and runs before each level; waiting_s: all that waits;
        passing: how much it counts how requests to come pass the pipeline."""
        variation, gap_s = traffic.gap_variation, traffic.gap_s
        regularity = 1.0 - min(variation, 1.0)
        soon = (max(variation, 1.0) - 1.0) / 2.0 * max(1.0 - (now_s - traffic.last_s) / (2.0 * gap_s), 0.0)
        horizon_s = traffic.horizon_s(now_s)
        stretch = float(steady.stretch(np.array(steady.pace_s)))
        drain, busy_s = 1.0 - stretch * float(levels.upto[-1]), stretch * waiting_s
        until_s = busy_s / drain if drain * horizon_s > busy_s else horizon_s
        return cls(
            rate=levels.share / gap_s,
            load=levels.upto,
            ahead=np.array(before_s) / max(waiting_s, 1e-12),
            steady=steady,
            behind=behind,
            num_passing=passing * until_s / gap_s,
            horizon_s=horizon_s,
            spare_s=regularity * max(traffic.last_s + gap_s - now_s, 0.0),
            at_once=regularity / 2.0 + soon,
            soon_s=soon * traffic.work_s,
            weight=weight,
        )

    def costs_s(self, busy_s: npt.ArrayLike, pace_s: npt.ArrayLike) -> Floats:
        """Seconds that requests to come wait and pass in all, for each of some choices.

        busy_s: what the waiting work keeps the first stage busy; pace_s: the longest round, with those in flight.
        """
        busy = np.asarray(busy_s, dtype=np.float64)
        if not len(self.rate):
            return np.zeros_like(busy)
        pace = np.maximum(pace_s, self.steady.pace_s)
        drain = 1.0 - self.steady.stretch(pace)[..., None] * self.load
        left_s = np.maximum(busy[..., None] * self.ahead - self.spare_s + self.soon_s, 0.0)
        drained = left_s * left_s / (2.0 * np.maximum(drain, LEAST_DRAIN))
        outlasts = left_s * self.horizon_s - drain * (self.horizon_s * self.horizon_s / 2.0)
        waited = np.where(drain * self.horizon_s >= left_s, drained, outlasts) * (left_s > 0.0)
        waits: Floats = (waited + self.at_once / self.rate.sum() * left_s) @ self.rate
        return self.weight * (waits + self.num_passing * self.behind * pace)

    def cost_s(self, busy_s: float, pass_s: float) -> float:
        """The same of one choice; pass_s: seconds between the first stage's last end and the last stage's."""
        return float(self.costs_s(busy_s, pass_s / self.behind if self.behind else 0.0))


NONE_TO_COME = Outlook()

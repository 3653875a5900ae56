"""Forecasts later arrivals from those so far: how long they would wait for a decision made now.

While `V` seconds of work wait, requests arrive at a rate `a` and bring a load `r` (seconds of work a second), `V` falls
by 1 - r a second. All that arrive before it is gone wait for what is left of it: a V^2 / (2 (1 - r)) seconds in all.
That is the value function of the M/G/1 queue, without what any decision costs alike (Hyytia, Aalto, Penttinen and
Virtamo, "On the value function of the M/G/1 FCFS and LCFS queues", 2012). A rule that adds it to the cost of each of
its choices is one step of policy iteration: where its model holds it is no worse than the rule whose load `r` is.
Over a horizon `H` the same is a (V H - (1 - r) H^2 / 2) where work outlasts it; under overload it always does. The
horizon is as long as arrivals have been watched.

Arrivals need not be Poisson's. Regular ones leave time until the next one: work done by then delays nobody. Of bursts,
a renewal process whose times between arrivals have the variation c^2, (c^2 - 1) / 2 more come soon after one has.

The load depends on the rounds. A request of `w` seconds in `q` rounds with an overhead of `o` each, or 1 / q requests
to a round, takes S = w + q o of the pipeline and S + (K - 1) (w / q + o) to pass it, and waits about r / (1 - r) *
(c_a^2 + c_s^2) / 2 * S before (Kingman, 1961; for Poisson arrivals Pollaczek and Khinchine's mean), `c_a` and `c_s` the
variation of the times between arrivals and of the work. The least of the sum over `q` tells the load that the pipeline
should run at. Rounds that hold all that waits are a bulk service queue, whose throughput grows with its rounds (Inoue,
"Queueing analysis of GPU-based inference servers with dynamic batching", 2021): with a backlog the load is less than
that, and requests to come count less than by the formula (`OnlineSettings.foresight`). Regular arrivals below capacity
leave no backlog, and count in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 128
"""Arrivals over which the running means reach."""
PRIOR_ARRIVALS = 4.0
"""How many arrivals the assumption counts for that they are Poisson's."""
ROUNDS_A_REQUEST = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Rounds a request that are weighed; below 1, requests share a round."""
MOST_VARIATION = 25.0
AT_ONCE_S = 1e-9
"""Mean time between arrivals up to which they count as one arrival."""


@dataclass(slots=True)
class Traffic:
    """Running means over the requests that have come."""

    count: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    gap_s: float = 0.0
    gap_square: float = 0.0
    work_s: float = 0.0
    work_square: float = 0.0

    def note(self, now_s: float, work_s: float) -> None:
        """A request has arrived, with so many seconds of work for the slowest stage."""
        share = 1.0 / min(self.count + 1, MEMORY)
        self.work_s += share * (work_s - self.work_s)
        self.work_square += share * (work_s * work_s - self.work_square)
        if self.count:
            share = 1.0 / min(self.count, MEMORY)
            gap_s = max(now_s - self.last_s, 0.0)
            self.gap_s += share * (gap_s - self.gap_s)
            self.gap_square += share * (gap_s * gap_s - self.gap_square)
        else:
            self.first_s = now_s
        self.count += 1
        self.last_s = max(self.last_s, now_s)

    @property
    def is_known(self) -> bool:
        """Whether requests have arrived at more than one time."""
        return self.gap_s > AT_ONCE_S

    @property
    def gap_variation(self) -> float:
        """Variance of the time between arrivals over its squared mean: 0 if regular, 1 if Poisson."""
        count = min(self.count - 1, MEMORY)
        seen = self.gap_square / self.gap_s**2 - 1.0
        return min(max((count * seen + PRIOR_ARRIVALS) / (count + PRIOR_ARRIVALS), 0.0), MOST_VARIATION)

    @property
    def work_variation(self) -> float:
        """Variance of the work of a request over its squared mean."""
        return max(self.work_square / self.work_s**2 - 1.0, 0.0) if self.work_s else 0.0

    def load(self, overheads_s: Sequence[float], stages_after: int) -> float:
        """Seconds of work and overhead that arrive a second, in the rounds of the least time in the system.

        overheads_s: of a round, for each of ROUNDS_A_REQUEST.
        """
        best, load = math.inf, math.inf
        variation = (self.gap_variation + self.work_variation) / 2.0
        for rounds, per_round_s in zip(ROUNDS_A_REQUEST, overheads_s, strict=True):
            busy_s = self.work_s + rounds * per_round_s
            share = busy_s / self.gap_s
            if share >= 1.0:
                if not math.isfinite(best):
                    load = min(load, share)
                continue
            round_s = self.work_s / rounds + per_round_s
            pass_s = max(busy_s, round_s) + stages_after * round_s
            time_s = pass_s + share / (1.0 - share) * variation * busy_s
            if time_s < best:
                best, load = time_s, share
        return load


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What work that is left over costs requests to come."""

    rate: float = 0.0
    """Arrivals a second; 0 where none are expected."""
    load: float = 0.0
    horizon_s: float = 0.0
    spare_s: float = 0.0
    """Work that is surely done before the next one arrives."""
    regularity: float = 0.0
    """1 for regular arrivals, 0 for Poisson."""
    weight: float = 1.0
    """How much their waiting counts."""
    soon: float = 0.0
    """Requests that will come soon because one has: more than Poisson's, by a renewal process' excess."""
    soon_s: float = 0.0
    """Their work."""

    @classmethod
    def of(cls, traffic: Traffic, now_s: float, load: float, foresight: float = 1.0) -> Outlook:
        """The outlook at a time; `foresight` as in `OnlineSettings`."""
        if not traffic.is_known:
            return NONE_TO_COME
        variation = traffic.gap_variation
        regularity = 1.0 - min(variation, 1.0)
        excess = (max(variation, 1.0) - 1.0) / 2.0
        soon = excess * max(1.0 - (now_s - traffic.last_s) / (2.0 * traffic.gap_s), 0.0)
        return cls(
            soon=soon,
            soon_s=soon * traffic.work_s,
            rate=1.0 / traffic.gap_s,
            load=load,
            horizon_s=max(now_s - traffic.first_s, traffic.gap_s),
            spare_s=regularity * max(traffic.last_s + traffic.gap_s - now_s, 0.0),
            regularity=regularity,
            weight=max(foresight, foresight + (1.0 - foresight) * regularity),
        )

    def cost_s(self, busy_s: float) -> float:
        """Seconds that requests to come wait, in all and as they count, for so many seconds of work."""
        left_s = busy_s - self.spare_s + self.soon_s
        if left_s <= 0.0 or not self.rate:
            return 0.0
        drain, horizon_s = 1.0 - self.load, self.horizon_s
        if drain * horizon_s >= left_s:
            waited = left_s * left_s / (2.0 * drain)
        else:
            waited = left_s * horizon_s - drain * horizon_s * horizon_s / 2.0
        return self.weight * (self.rate * waited + (self.regularity / 2.0 + self.soon) * left_s)


NONE_TO_COME = Outlook()

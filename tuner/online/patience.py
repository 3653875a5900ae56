"""The running order under a limit on waiting: least work first, unless a request would wait longer than the limit.

Every request is given the same time from its arrival on, so that by deadline they run as they came. What runs in that
order leaves each of them some slack: its deadline less when it would end. A request may run before all that came
earlier as long as each of those has slack for its work (slack stealing: Lehoczky and Ramos-Thuel, "An optimal algorithm
for scheduling soft-aperiodic tasks in fixed-priority preemptive systems", 1992). Of those that may, the one with the
least work for its weight is next. Work that arrives later has later deadlines and takes no slack. So where first come
first served keeps the limit, this order does, and short prompts pass long ones as far as the limit allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_PICKS = 32
"""How many are taken out of turn in one order; those after them run as they came."""


def running_order(rank: Sequence[float], work_s: Sequence[float], slack_s: Sequence[float]) -> list[int]:
    """The order of requests that are given as they came.

    rank: the least runs first, where it may. work_s: what each delays those it passes by. slack_s: how much each can be
    delayed by those that pass it; whose slack is below zero already is passed by none.
    """
    ranks, work, slack = (np.array(column, dtype=np.float64) for column in (rank, work_s, slack_s))
    order: list[int] = []
    before, least = np.full(len(ranks), np.inf), np.empty(len(ranks))
    for _ in range(min(len(ranks), MOST_PICKS)):
        before[1:] = slack[:-1]
        np.minimum.accumulate(before, out=least)
        place = int(np.where(work <= least, ranks, np.inf).argmin())
        slack[:place] -= work[place]
        ranks[place] = slack[place] = np.inf  # neither runs nor is passed again
        order.append(place)
    taken = set(order)
    return order + [place for place in range(len(ranks)) if place not in taken]

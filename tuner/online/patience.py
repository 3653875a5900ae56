"""The running order under a limit on waiting: least work first, as far as every request still ends in time.

Every request is given the same time from its arrival on, so that by deadline they run as they came. Of all orders that
keep all deadlines, the one with the least sum of ends is found from its end (Smith, "Various optimizers for
single-stage production", 1956): last comes, of those whose deadline is no sooner than all the work is done, the one
with the most work for its weight; then the same for what is left. With weights that is a heuristic. Where the last
place would be too late for all, the last to have come takes it. So where first come first served keeps the limit, this
order does, and short prompts pass long ones as far as the limit allows. Work that arrives later has later deadlines.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def running_order(rank: Sequence[float], work_s: Sequence[float], due_s: Sequence[float]) -> list[int]:
    """The order of requests that are given as they came.

    rank: the least runs first, where it may. work_s: of each, one after the other. due_s: seconds from now until each
    should have ended; never falling.
    """
    end_s, latest = sum(work_s), len(rank)
    order: list[int] = []
    in_time: list[tuple[float, int]] = []  # (-rank, -place) of those not placed that may still end at end_s
    for _ in rank:
        while latest and due_s[latest - 1] >= end_s:
            latest -= 1
            heapq.heappush(in_time, (-rank[latest], -latest))
        if in_time:
            place = -heapq.heappop(in_time)[1]
        else:
            place = latest = latest - 1
        order.append(place)
        end_s -= work_s[place]
    order.reverse()
    return order

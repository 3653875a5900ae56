"""What requests can have at best where one machine does one thing at a time, and good orders in which to run them.

A stage of a pipeline is such a machine, and what else a plan has to do only makes it later. So no plan is better, if a
request's seconds are the least that it takes there (`rounds.ends.mean_ttft`, `search.floors`). Work may be interrupted.

With equal weights the shortest remaining time first is the least sum of ends (Schrage, "A proof of the optimality of
the shortest remaining processing time discipline", 1968); where all are there from the start it ends the k-th sooner
than any other order, for every k. With other weights and no arrivals least work for its weight first is (Smith, 1956).
With both the least is not known to be found quickly; below it is the sum of weight(r) (M(r) + p(r) / 2), M(r) the mean
of the times at which r runs when, of those that are there, the one with most weight a second of work always runs
(Goemans, Queyranne, Schulz, Skutella and Wang, "Single machine scheduling with release dates", 2002): in every schedule
r ends p(r) / 2 or more after the mean of its times. The earliest deadline first makes the latest least late (Horn,
1974).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.stage_cost import Floats

ROUNDING = 1e-9
"""Share by which work may exceed the time until a deadline and still count as done by it."""


def least_ends_s(release: Floats, seconds: Floats, weights: Floats) -> float:
    """No weighted sum of ends is smaller."""
    if not release.any():
        order = by_weight(seconds, weights)
        return float(np.cumsum(seconds[order]) @ weights[order])
    if (weights == weights[0]).all():
        return float(weights[0]) * _shortest_remaining_first(release.tolist(), seconds.tolist())
    return _by_mean_times(release.tolist(), seconds.tolist(), weights.tolist())


def least_lateness_s(release: Floats, seconds: Floats, due: Floats) -> float:
    """No largest end less `due` is smaller."""
    order = np.argsort(due, kind="stable")
    if not release.any():
        return float((np.cumsum(seconds[order]) - due[order]).max())
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    ends = _ends_by_rank(release.tolist(), seconds.tolist(), rank.tolist())
    return float((np.array(ends) - due).max())


def most_in_time(seconds: Floats, due: Floats, weights: Floats) -> float:
    """No order meets more of the weights by `due`, all being there from the start.

    Of those due by any time no more is done by then than fits into it, those of most weight for their work.
    """
    best = float(weights.sum())
    dense = np.argsort(seconds / np.maximum(weights, 1e-300))
    seconds, due, weights = seconds[dense], due[dense], weights[dense]
    for limit in np.unique(due[np.isfinite(due)]):
        early = due <= limit
        spent = np.cumsum(seconds[early])
        room = limit * (1.0 + ROUNDING)
        whole = int(np.searchsorted(spent, room, side="right"))
        early_weights = weights[early]
        done = float(early_weights[:whole].sum())
        if whole < len(spent) and not (early_weights == early_weights[0]).all():
            before = float(spent[whole - 1]) if whole else 0.0
            done += float(early_weights[whole]) * max(room - before, 0.0) / float(spent[whole] - before)
        best = min(best, done + float(weights[~early].sum()))
    return best


def by_weight(seconds: Floats, weights: Floats) -> Ints:
    """Least work for its weight first."""
    return np.argsort(seconds / np.maximum(weights, 1e-300), kind="stable")


def most_on_time(by_deadline: Sequence[int], work_s: Sequence[float], due: Sequence[float]) -> list[int]:
    """Moore and Hodgson (1968): in deadline order, drop the longest so far whenever one would be late; the dropped go
    last."""
    kept: list[tuple[float, int]] = []
    done_s, dropped = 0.0, set[int]()
    for index in by_deadline:
        heapq.heappush(kept, (-work_s[index], index))
        done_s += work_s[index]
        if done_s > due[index]:
            longest_s, longest = heapq.heappop(kept)
            done_s += longest_s
            dropped.add(longest)
    return [i for i in by_deadline if i not in dropped] + sorted(dropped, key=lambda i: work_s[i])


def _shortest_remaining_first(release: Sequence[float], seconds: Sequence[float]) -> float:
    """Sum of ends."""
    order = sorted(range(len(release)), key=lambda i: release[i])
    waiting: list[float] = []
    now, total, come = 0.0, 0.0, 0
    while waiting or come < len(order):
        if not waiting:
            now = max(now, release[order[come]])
        while come < len(order) and release[order[come]] <= now:
            heapq.heappush(waiting, seconds[order[come]])
            come += 1
        until = release[order[come]] if come < len(order) else float("inf")
        left = waiting[0]
        if now + left <= until:
            now += left
            heapq.heappop(waiting)
            total += now
        else:
            heapq.heapreplace(waiting, left - (until - now))
            now = until
    return total


def _ends_by_rank(release: Sequence[float], seconds: Sequence[float], rank: Sequence[int]) -> list[float]:
    """End of each, of those that are there the one of least rank always running."""
    order = sorted(range(len(release)), key=lambda i: release[i])
    waiting: list[tuple[int, int]] = []
    left, ends = list(seconds), [0.0] * len(seconds)
    now, come = 0.0, 0
    while waiting or come < len(order):
        if not waiting:
            now = max(now, release[order[come]])
        while come < len(order) and release[order[come]] <= now:
            heapq.heappush(waiting, (rank[order[come]], order[come]))
            come += 1
        until = release[order[come]] if come < len(order) else float("inf")
        i = waiting[0][1]
        if now + left[i] <= until:
            now += left[i]
            ends[i] = now
            heapq.heappop(waiting)
        else:
            left[i] -= until - now
            now = until
    return ends


def _by_mean_times(release: Sequence[float], seconds: Sequence[float], weights: Sequence[float]) -> float:
    """Sum of weight (mean time at which it runs + half its work), the most weight a second of work first."""
    order = sorted(range(len(release)), key=lambda i: release[i])
    waiting: list[tuple[float, int]] = []
    left, now, come, total = list(seconds), 0.0, 0, 0.0
    while waiting or come < len(order):
        if not waiting:
            now = max(now, release[order[come]])
        while come < len(order) and release[order[come]] <= now:
            i = order[come]
            if seconds[i] > 0.0:
                heapq.heappush(waiting, (-weights[i] / seconds[i], i))
            else:
                total += weights[i] * release[i]
            come += 1
        if not waiting:
            continue
        until = release[order[come]] if come < len(order) else float("inf")
        i = waiting[0][1]
        ran = min(left[i], until - now)
        total += weights[i] * (now + ran / 2.0) * ran / seconds[i]
        left[i] -= ran
        now += ran
        if left[i] <= 0.0:
            heapq.heappop(waiting)
            total += weights[i] * seconds[i] / 2.0
    return total

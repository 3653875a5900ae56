"""The waiting requests: the remaining tokens of each, and all of them in running order."""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.plan.plan import Request


@dataclass(slots=True)
class Waiting:
    """A request with tokens to run."""

    index: int
    request: Request
    done: int
    work_s: float = 0.0
    """Seconds that its remaining tokens take on the slowest stage, cut nowhere."""
    context_work: float = 0.0
    """work_s times the mean context of its remaining tokens: what its chunks will read again."""
    rank: float = 0.0
    """Its place in the running order, the smallest first; changes only when it runs."""

    @property
    def left(self) -> int:
        """Tokens to run."""
        return self.request.prompt_tokens - self.done


class WaitingOrder:
    """Requests that wait, the smallest rank first, and what a decision sums up of them as columns in that order.

    Columns are kept beside the order because a decision reads all of them, while a round changes a few places.
    """

    def __init__(self) -> None:
        self._places: list[tuple[float, int]] = []  # (rank, index), sorted
        self.indices: list[int] = []
        self.work_s, self.context_work, self.weights = array("d"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self.indices)

    def insert(self, waiting: Waiting) -> None:
        """A request waits from here on."""
        place = (waiting.rank, waiting.index)
        at = bisect_left(self._places, place)
        self._places.insert(at, place)
        self.indices.insert(at, waiting.index)
        self.work_s.insert(at, waiting.work_s)
        self.context_work.insert(at, waiting.context_work)
        self.weights.insert(at, waiting.request.weight)

    def remove(self, waiting: Waiting) -> None:
        """A request, unchanged since it was inserted, waits no more."""
        at = bisect_left(self._places, (waiting.rank, waiting.index))
        for column in (self._places, self.indices, self.work_s, self.context_work, self.weights):
            del column[at]

    def work_before(self, ranks: Sequence[float]) -> list[float]:
        """Seconds of work of those up to each rank."""
        work_s = list(itertools.accumulate(self.work_s, initial=0.0))
        return [work_s[bisect_right(self._places, (rank, math.inf))] for rank in ranks]

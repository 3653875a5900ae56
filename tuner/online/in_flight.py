"""Rounds in flight: when stage 0 takes the next one, when they should leave, and how far behind the engine is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from db.errors import UserError
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round
from tuner.serving.answers import Beside
from tuner.serving.clock import Clock


class InFlight:
    """The pipeline as its cost model says it runs, corrected by what the engine tells."""

    def __init__(self, cost: CostModel, window: int | None) -> None:
        self.clock = Clock(cost, window=None)
        self._cost, self._window = cost, window
        self._leaving: deque[float] = deque()  # when each round in flight should leave the last stage
        self._late_s = 0.0  # how much later than the clock the engine is

    @property
    def is_full(self) -> bool:
        """Whether the window lets no round in."""
        return self._window is not None and len(self._leaving) >= self._window

    @property
    def expected_s(self) -> float:
        """When the oldest round should leave the last stage; infinite without one."""
        return self._leaving[0] if self._leaving else math.inf

    @property
    def pass_s(self) -> float:
        """Seconds from when stage 0 is free to when the last stage is."""
        return self.clock.finish_s[-1] - self.clock.finish_s[0]

    def start_s(self, now_s: float) -> float:
        """When the next round may start, by the clock."""
        return max(now_s - self._late_s, self.clock.ready_s())

    def run(self, chunks: Round, requests: Sequence[Request], start_s: float, beside: Beside) -> None:
        """A round starts."""
        self._leaving.append(self.clock.run(chunks, requests, start_s, beside))

    def finish(self, now_s: float | None) -> None:
        """The oldest round has left the last stage; its time, if given, corrects the clock."""
        if not self._leaving:
            raise UserError("finish_round", "", "no round is in flight")
        expected_s = self._leaving.popleft()
        if now_s is not None:
            self._late_s = now_s - expected_s

    def lag_s(self, start_s: float, hop_share: float) -> float:
        """What rounds may take without leaving any later than what is in flight makes them, their hand-offs beside.

        hop_share: of a round's seconds that handing it on takes.
        """
        stages_after = self._cost.pp_size - 1
        if not stages_after:
            return 0.0
        pass_s = (self.clock.finish_s[-1] - start_s) / stages_after - self._cost.hop_latency_s
        return pass_s / (1.0 + hop_share)

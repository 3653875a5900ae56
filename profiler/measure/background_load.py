"""Background load for a card: keeps its clocks at their level of a running model, and measures that level.

A card under load is held at its power limit by its clocks: an H100 swings between 1.3 and 1.9 GHz within tenths of
a second, and products measured one after another differ by ten percent. Work of a model's own mix between the samples
brings every kernel to the same power; its time, beside its usual one, says how fast the clock was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

from profiler.kernels.recording import new_scratch, record

LOAD_S = 2e-3  # a repetition
# A card that rested runs a tenth of a second at its highest clock, a sixth faster than it can go on, and answers the
# new load some 0.8 s later with a quarter of a second at its lowest. What comes then is what a busy card does.
SETTLE_S, _LISTEN_S = 1.0, 1.0
_AHEAD = 3  # repetitions that the host is at most before the card
_MOST_SHIFT = 0.3  # beyond it something else disturbed the card


class BackgroundLoad:
    """Whole layers over a round of middling size, LOAD_S of them."""

    def __init__(
        self, layer: Callable[[int], object], layer_s: float, device: torch.device, *, recordable: bool = True
    ) -> None:
        self.device = device
        self.num_layers = max(1, math.ceil(LOAD_S / layer_s))

        def work() -> object:
            return [layer(call) for call in range(self.num_layers)][-1]

        self.run = record(work, device, new_scratch(device)) if recordable else work
        self.run()
        self.usual_us = self._listen()

    def clock_factor(self, load_us: list[float]) -> float:
        """The factor that scales a kernel's time to the usual clock, from the load's time measured beside it."""
        factor = self.usual_us / (sum(load_us) / len(load_us))
        return min(max(factor, 1.0 - _MOST_SHIFT), 1.0 + _MOST_SHIFT)

    def _listen(self) -> float:
        """Median time once the card has settled under uninterrupted load."""
        for seconds in (SETTLE_S, _LISTEN_S):
            events = keep_busy(self.run, seconds, self.device)
        return float(median(before.elapsed_time(after) for before, after in pairwise(events))) * 1e3


def keep_busy(run: Callable[[], object], seconds: float, device: torch.device) -> list[torch.cuda.Event]:
    """Run over and over for so long -> events between the runs."""
    events: list[torch.cuda.Event] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        run()
        if len(events) > _AHEAD:
            events[-_AHEAD].synchronize()
    torch.cuda.synchronize(device)
    return events

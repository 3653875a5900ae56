"""A card's usual work: keeps its clocks where they are in the middle of a run, and tells where they are.

A card under load is held at its power limit by its clocks: an H100 swings between 1.3 and 1.9 GHz within tenths of
a second, and products measured one after another differ by ten percent. Work of a model's own mix between the samples
brings every kernel to the same power; its time, beside its mean over a second, says how fast the clock was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from profiler.recording import new_scratch, record

LOAD_S = 2e-3  # a repetition
_REST_S, _BURST_S = 0.5, 1.0
_MOST_SHIFT = 0.15  # beyond it something else disturbed the card


class Load:
    """Whole layers over a round of middling size, LOAD_S of them."""

    def __init__(self, layer: Callable[[int], object], layer_s: float, device: torch.device) -> None:
        self.device = device
        num_layers = max(1, math.ceil(LOAD_S / layer_s))
        self.run = record(lambda: [layer(call) for call in range(num_layers)][-1], device, new_scratch(device))
        self.run()
        self.usual_us = self._burst()

    def clock_factor(self, load_us: list[float]) -> float:
        """What a kernel's time is multiplied by to stand for the usual clock, by the load's time beside it."""
        factor = self.usual_us / (sum(load_us) / len(load_us))
        return min(max(factor, 1.0 - _MOST_SHIFT), 1.0 + _MOST_SHIFT)

    def _burst(self) -> float:
        """Mean time over a burst of a second after a rest: what a prompt of about that length meets.

        The first hundred milliseconds run at the highest clock, a tenth faster than the mean; seconds of uninterrupted
        load end at the lowest, as much slower.
        """
        torch.cuda.synchronize(self.device)
        time.sleep(_REST_S)
        events: list[torch.cuda.Event] = []
        end = time.perf_counter() + _BURST_S
        while time.perf_counter() < end:
            for _ in range(10):
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()
                self.run()
            events[-1].synchronize()
        return float(events[0].elapsed_time(events[-1])) / (len(events) - 1) * 1e3

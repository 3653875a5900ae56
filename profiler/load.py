"""A card's usual work: keeps its clocks where they are in the middle of a run, and tells where they are.

A card under load is held at its power limit by its clocks: an H100 swings between 1.3 and 1.9 GHz within tenths of
a second, and products measured one after another differ by ten percent. Work of a model's own mix between the samples
brings every kernel to the same power; its time, beside its mean over seconds, says how fast the clock was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from profiler.recording import new_scratch, record

LOAD_S = 2e-3  # a repetition
_SETTLE_S = 1.5
_MOST_SHIFT = 0.15  # beyond it something else disturbed the card


class Load:
    """Whole layers over a round of middling size, LOAD_S of them."""

    def __init__(self, layer: Callable[[int], object], layer_s: float, device: torch.device) -> None:
        self.device = device
        num_layers = max(1, math.ceil(LOAD_S / layer_s))
        self.run = record(lambda: [layer(call) for call in range(num_layers)][-1], device, new_scratch(device))
        self.usual_us = self._settle()

    def clock_factor(self, load_us: list[float]) -> float:
        """What a kernel's time is multiplied by to stand for the usual clock, by the load's time beside it."""
        factor = self.usual_us / (sum(load_us) / len(load_us))
        return min(max(factor, 1.0 - _MOST_SHIFT), 1.0 + _MOST_SHIFT)

    def _settle(self) -> float:
        """Mean time over a second, once the card is warm."""
        events: list[torch.cuda.Event] = []
        end = time.perf_counter() + _SETTLE_S
        while time.perf_counter() < end:
            for _ in range(10):
                events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                events[-1].record()
                self.run()
            events[-1].synchronize()
        late = events[len(events) // 3 :]
        return float(late[0].elapsed_time(late[-1])) / (len(late) - 1) * 1e3

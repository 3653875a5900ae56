"""When each round starts and finishes on a stage: read from the host's clock, or from events on a CUDA stream."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from runtime.job.job import Interval


class RoundClock(Protocol):
    """Records the times of rounds in order. Nothing is synchronised between `begin` and `intervals`."""

    origin_s: float  # of the host's clock, when the pass began

    def begin(self) -> None:
        """Start a pass."""

    def start(self) -> None:
        """The next round's work follows."""

    def finish(self) -> None:
        """The round's work has been given to the device."""

    def intervals(self) -> list[Interval]:
        """Start and finish of each round in seconds after `begin`; waits for the device."""


class HostClock:
    """On a CPU work is done when the call returns. `perf_counter` is one clock for all processes of a machine."""

    def __init__(self) -> None:
        self.origin_s = 0.0
        self._times: list[float] = []

    def begin(self) -> None:
        """See `RoundClock`."""
        self._times = []
        self.origin_s = time.perf_counter()

    def start(self) -> None:
        """See `RoundClock`."""
        self._times.append(time.perf_counter())

    finish = start

    def intervals(self) -> list[Interval]:
        """See `RoundClock`."""
        seconds = [at - self.origin_s for at in self._times]
        return list(zip(seconds[::2], seconds[1::2], strict=True))


class EventClock:
    """On CUDA events are recorded between the kernels and read after the pass."""

    def __init__(self) -> None:
        self.origin_s = 0.0
        self._origin = _event()
        self._events: list[torch.cuda.Event] = []
        self._passes = 0

    def begin(self) -> None:
        """See `RoundClock`; the device must be idle, so that its origin is the host's."""
        self._events = []
        self._passes += 1
        self._origin = _event()
        self._origin.record()
        self.origin_s = time.perf_counter()

    def start(self) -> None:
        """See `RoundClock`."""
        event = _event()
        event.record()
        self._events.append(event)

    finish = start

    def intervals(self) -> list[Interval]:
        """See `RoundClock`."""
        torch.cuda.synchronize()
        seconds = [self._origin.elapsed_time(event) / 1e3 for event in self._events]
        return list(zip(seconds[::2], seconds[1::2], strict=True))

    def place(self) -> tuple[int, int] | None:
        """The pass, and how many of its rounds' starts and finishes the device has come to; from any thread."""
        passes, events = self._passes, self._events
        low, high = 0, len(events)  # events are met in order
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if events[middle].query() else (low, middle)
        return (passes, low) if events else None


def make_clock(device: torch.device) -> RoundClock:
    """The clock of a device."""
    return EventClock() if device.type == "cuda" else HostClock()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)

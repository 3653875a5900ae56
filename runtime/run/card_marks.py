"""Marks the round that a card is running: the host queues rounds ahead, so its own position does not tell."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

from profiler.comm.ranks.mark import Doing, Progress
from runtime.run.clock import EventClock, RoundClock

if TYPE_CHECKING:
    from runtime.run.pipeline import Pipeline

_LOOK_EVERY_S = 0.5


class CardMarks(threading.Thread):
    """Polls the events between rounds and updates the rank's mark; does nothing on a CPU."""

    def __init__(self, clock: EventClock | None, pipeline: Pipeline, progress: Progress) -> None:
        super().__init__(daemon=True, name="card marks")
        self.clock, self.pipeline, self.progress = clock, pipeline, progress
        self.is_decoding = False  # whether the clock's work is steps of decode and not the job's rounds
        self._ended = threading.Event()
        self._seen: tuple[int, int] | None = None

    @classmethod
    def of(cls, clock: RoundClock, pipeline: Pipeline, progress: Progress) -> CardMarks:
        """Marks for the clock of a device."""
        return cls(clock if isinstance(clock, EventClock) else None, pipeline, progress)

    def __enter__(self) -> CardMarks:
        if self.clock is not None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.clock is not None:
            self.join()

    def run(self) -> None:
        """Poll until the end."""
        while not self._ended.wait(_LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Update the mark if the card has moved on."""
        assert self.clock is not None
        place = self.clock.place()
        if place == self._seen or place is None:
            return
        self._seen = place
        _, num_events = place
        pipeline, is_running = self.pipeline, num_events % 2 == 1
        index, task = pipeline.task_at(num_events // 2, is_decoding=self.is_decoding)
        until_s = 0.0
        if index < len(pipeline.job.rounds):
            until_s = pipeline.arrival_s(pipeline.job.rounds[index])
        self.progress.mark(pipeline.place.stage, index, until_s=until_s)
        if is_running:
            return
        if task.source is not None:
            self.progress.wait(Doing.RECEIVE, pipeline.sources[task.source])
        elif task.group == 0 and pipeline.last is not None and index >= (pipeline.job.window or index + 1):
            self.progress.wait(Doing.RETURN, pipeline.last)

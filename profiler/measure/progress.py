"""Progress of a profile: a bar on a terminal, an occasional line elsewhere; drawn only between points."""

from __future__ import annotations

import sys
import time
from types import TracebackType

LINE_EVERY_S = 10.0


class ProfileProgress:
    """Counts points and the seconds they are expected to take.

    num_points, expected_s: of the whole profile. deadline: `time.monotonic()` after which no point is begun.
    """

    def __init__(self, *, num_points: int, expected_s: float, deadline: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.num_points, self.expected_s, self.deadline = num_points, max(expected_s, 1e-9), deadline
        self.done_points, self.done_s = 0, 0.0
        self.started = self.last_line = time.monotonic()
        console = Console(file=sys.stderr)
        # No refreshing thread: it would take its share of the cores that are measured.
        self.bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}  {task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=num_points, left="?")

    def __enter__(self) -> ProfileProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    @property
    def work_left_s(self) -> float:
        """By the share of the expected work that is done."""
        pace = (time.monotonic() - self.started) / self.done_s if self.done_s else 1.0
        return pace * max(0.0, self.expected_s - self.done_s)

    @property
    def budget_left_s(self) -> float:
        """Until no point is begun any more."""
        return max(0.0, self.deadline - time.monotonic())

    def extend(self, num_points: int, expected_s: float) -> None:
        """Add points to be measured."""
        self.num_points += num_points
        self.expected_s += expected_s
        self.bar.update(self.task, total=self.num_points)

    def advance(self, text: str, expected_s: float) -> None:
        """A point that was expected to take so long is done; `text` names the next."""
        self.done_points += 1
        self.done_s += expected_s
        self.num_points = max(self.num_points, self.done_points)  # what was measured may ask for more than was listed
        left = f"{self.work_left_s:.0f} s of work left, {self.budget_left_s:.0f} s of the budget"
        self.bar.update(self.task, total=self.num_points, completed=self.done_points, left=left, description=text)
        self.bar.refresh()
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            spent = now - self.started
            print(
                f"profile: {self.done_points} of {self.num_points} points in {spent:.0f} s, about {left} ({text})",
                file=sys.stderr,
                flush=True,
            )

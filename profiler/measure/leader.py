"""The first rank of a profile: decides which point is next and when to stop, and commits the rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import takewhile

import torch

from db.rows.measurements import Measurement, save_measurements
from db.store.engine import open_database
from profiler.comm.ranks.rank import RankContext
from profiler.measure.expected_time import expected_seconds
from profiler.measure.progress import ProfileProgress
from profiler.measure.session import STOP, ProfileJob, RankSession
from profiler.points.point import Point

COMMIT_EVERY_S = 0.5


@torch.inference_mode()
def profile_rank(context: RankContext, job: ProfileJob) -> int:
    """Measure what is missing until it is done or time is up; returns how many points this rank measured."""
    session = RankSession(context, job)
    if context.rank == 0:
        return Leader(session, job).run()
    return session.follow()


class Leader:
    """The first rank's part: chooses the next point, decides when to stop, and commits rows."""

    def __init__(self, session: RankSession, job: ProfileJob) -> None:
        self.session, self.job = session, job
        self.database = open_database(job.database_url)
        self.unsaved: list[Measurement] = []
        self.last_commit = time.monotonic()
        missing = list(session.worklist.missing())
        self.deadline = time.monotonic() + job.budget_s
        self.progress = ProfileProgress(
            num_points=len(missing), expected_s=sum(map(self.expected_seconds, missing)), deadline=self.deadline
        )

    def run(self) -> int:
        """Measure until nothing is missing or time is up. Rows are kept whatever ends it."""
        measured = 0
        index_of = {point.key: index for index, point in enumerate(self.job.points)}
        try:
            with self.progress:
                for point in self.upcoming():
                    self.session.agree_on_index(index_of[point.key])
                    self.keep(self.session.measure(point))
                    measured += 1
                    self.progress.advance(str(point), self.expected_seconds(point))
            self.session.agree_on_index(STOP)
        finally:
            self.commit()
            self.database.close()
        return measured

    def upcoming(self) -> Iterator[Point]:
        """Missing points in order, then once more those that came out noisy, while there is time."""
        done = []
        for point in self.in_time(self.session.worklist.missing()):
            yield point
            done.append(point)
        rows = self.session.worklist.rows
        noisy = [point for point in done if point.key in rows and rows[point.key].noisy]
        self.progress.extend(len(noisy), sum(map(self.expected_seconds, noisy)))
        yield from self.in_time(noisy)
        # Measured again, another attention kernel may be the best.
        yield from self.in_time(self.session.worklist.missing())

    def in_time(self, points: Iterable[Point]) -> Iterator[Point]:
        """The points up to the first one that does not fit into the remaining time."""
        return takewhile(lambda point: not self.is_late(point), points)

    def is_late(self, point: Point) -> bool:
        """Whether the point does not fit into the remaining time."""
        return time.monotonic() + 0.5 * self.expected_seconds(point) > self.deadline

    def expected_seconds(self, point: Point) -> float:
        """Roughly how long the point takes here."""
        return expected_seconds(point, self.session.device.type, self.job.hardware.num_threads)

    def keep(self, rows: Iterable[Measurement]) -> None:
        """Commit the rows with those since the last commit, twice a second at most."""
        self.unsaved += rows
        if time.monotonic() - self.last_commit >= COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Write what is not written yet."""
        if self.unsaved:
            save_measurements(self.database, self.job.hardware, self.unsaved)
        self.unsaved = []
        self.last_commit = time.monotonic()

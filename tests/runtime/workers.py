"""Functions that tests run on ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from profiler.ranks import RankContext
from runtime.job import Job, RankReport
from runtime.rank import run_rank


def run_jobs(context: RankContext, jobs: Sequence[Job]) -> list[RankReport]:
    """Run several jobs one after another on the same ranks: starting ranks takes seconds, a small job does not."""
    return [run_rank(context, job) for job in jobs]


def raise_in_round_two(context: RankContext, job: Job) -> RankReport:
    return run_rank(_failing(context, _raise), job)


def die_in_round_two(context: RankContext, job: Job) -> RankReport:
    return run_rank(_failing(context, _die), job)


def _failing(context: RankContext, fail: Any) -> RankContext:
    """Stage 1 fails as it begins round 2."""

    class FailingProgress:
        def mark(self, stage: int, round_index: int) -> None:
            context.progress.mark(stage, round_index)
            if (stage, round_index) == (1, 2):
                fail()

    return replace(context, progress=FailingProgress())  # type: ignore[arg-type]


def _raise() -> None:
    raise ArithmeticError("two and two are five")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

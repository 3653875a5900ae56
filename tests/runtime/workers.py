"""Functions that tests run on ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from profiler.comm.ranks.rank import RankContext
from runtime.job.job import RankReport, RunJob
from runtime.run.rank import run_jobs


def raise_in_round_two(context: RankContext, jobs: Sequence[RunJob]) -> list[RankReport]:
    return run_jobs(_failing(context, _raise), jobs)


def die_in_round_two(context: RankContext, jobs: Sequence[RunJob]) -> list[RankReport]:
    return run_jobs(_failing(context, _die), jobs)


def raise_in_the_second_plan(context: RankContext, jobs: Sequence[RunJob]) -> list[RankReport]:
    return run_jobs(_failing(context, _raise, job=1), jobs)


def _failing(context: RankContext, fail: Any, job: int = 0) -> RankContext:
    """Stage 1 fails as it begins round 2 of a plan."""

    class FailingProgress:
        def __getattr__(self, name: str) -> Any:
            return getattr(context.progress, name)

        def mark(self, stage: int, round_index: int, *, until_s: float = 0.0) -> None:
            context.progress.mark(stage, round_index, until_s=until_s)
            if (stage, round_index, context.progress.read().job) == (1, 2, job):
                fail()

    return replace(context, progress=FailingProgress())  # type: ignore[arg-type]  # has what a rank calls


def _raise() -> None:
    raise ArithmeticError("two and two are five")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

"""Objectives: the quantity that a plan minimises."""

from __future__ import annotations

from enum import StrEnum

from db.errors import UserError

MAX_MAKESPAN_INCREASE = 0.02
"""Share of the least makespan that a plan for another objective gives up at most, unless it is told otherwise."""


class Objective(StrEnum):
    """What the rounds are optimised for."""

    MAKESPAN = "makespan"
    MEAN_TTFT = "mean-ttft"
    """Mean TTFT, weighted by each request's weight."""
    SLA = "sla"
    """Number of requests that meet their `sla_ttft_s` and `sla_tpot_s`, each with its weight; the mean TTFT breaks
    ties."""
    LATENESS = "lateness"
    """How late the latest request is: the largest TTFT less `sla_ttft_s`."""
    P99_TTFT = "p99-ttft"
    """99th percentile of the TTFTs."""

    @property
    def needs_deadlines(self) -> bool:
        """Whether it says nothing of requests without `sla_ttft_s`."""
        return self in (Objective.SLA, Objective.LATENESS)

    @classmethod
    def parse(cls, name: str) -> Objective:
        """The objective of this name. Raises UserError naming those there are."""
        if name not in list(cls):
            raise UserError("objective", name, f"one of {', '.join(cls)}")
        return cls(name)


def check_makespan_increase(share: float) -> None:
    """Raise UserError unless it is a share of the least makespan that may be given up; infinity stands for any."""
    if not share >= 0.0:  # NaN is not either
        raise UserError("max_makespan_increase", share, "a share of at least 0, such as 0.02, or infinity for no limit")

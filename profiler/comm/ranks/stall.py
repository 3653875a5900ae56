"""When ranks count as stalled, and which of them the others wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from profiler.comm.ranks.mark import Doing, Mark

SET_UP_LIMIT_S = 900.0
"""Silence that is allowed while ranks load weights, compile and connect."""
LEAST_LIMIT_S = 60.0
"""The least default for silence while rounds run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """No rank moved for longer than its limit; `rank` is the one that the others wait for."""

    rank: int
    mark: Mark
    error: str


def find_stall(
    marks: Mapping[int, Mark], *, now_s: float, limit_s: float, stopped: frozenset[int] = frozenset()
) -> Stall | None:
    """The stall of ranks with these marks, if there is one.

    limit_s: silence that is allowed while rounds run. stopped: ranks whose process is stopped (SIGSTOP).
    """
    if not marks:
        return None
    sets_up = any(mark.phase.is_set_up for mark in marks.values())
    # A process that is stopped gains nothing from the time that loading may take.
    allowed_s = max(SET_UP_LIMIT_S, limit_s) if sets_up and not stopped else limit_s
    last_s = max(max(mark.since_s, mark.until_s) for mark in marks.values())
    if now_s - last_s <= allowed_s:
        return None
    rank = find_culprit(marks, stopped)
    state = "is stopped (SIGSTOP) while it " if rank in stopped else ""
    error = f"{state}{marks[rank]}; no rank moved for {now_s - last_s:.0f} s"
    return Stall(rank=rank, mark=marks[rank], error=error)


def find_culprit(marks: Mapping[int, Mark], stopped: frozenset[int]) -> int:
    """The rank that the others wait for: a stopped one, else one at the end of a chain of waits, else the stalest."""
    if stopped & marks.keys():
        return min(stopped & marks.keys())
    # A rank that waits for all is not to blame while another one works.
    ends = [rank for rank, mark in marks.items() if mark.doing is Doing.WORK] or [
        rank for rank, mark in marks.items() if mark.peer is None or mark.peer not in marks
    ]
    return min(ends or marks, key=lambda rank: (marks[rank].since_s, rank))


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped or being traced, by Linux's account."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[:1] in (["T"], ["t"])

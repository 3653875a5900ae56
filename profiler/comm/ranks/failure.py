"""The cause of a failed launch: the first real failure, not the lost connections that follow from it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """The failure of one rank; stage and round are None before the first round.

    job: index of the plan among those of the launch. stacks: a file with the stacks of all ranks, after a stall.
    """

    rank: int
    error: str
    stage: int | None = None
    round_index: int | None = None
    job: int = 0
    stacks: str | None = None


class RanksFailedError(RuntimeError):
    """A rank died, raised or stalled; all have been ended.

    reports: what each rank reported before, in order, by rank.
    """

    def __init__(self, failure: RankFailure, reports: Mapping[int, list[Any]] | None = None) -> None:
        places = (("stage", failure.stage), ("round", failure.round_index))
        place = "".join(f", {name} {value}" for name, value in places if value is not None)
        stacks = f"; stacks of all ranks in {failure.stacks}" if failure.stacks else ""
        super().__init__(f"rank {failure.rank}{place}: {failure.error}{stacks}")
        self.failure = failure
        self.reports = dict(reports or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisedError:
    """An exception of a rank, as written to its error file. at_s: `time.monotonic()`."""

    error: str
    at_s: float
    is_lost_connection: bool


def first_failure(exit_codes: Mapping[int, int], raised: Mapping[int, RaisedError]) -> tuple[int, str]:
    """The rank to blame, and why.

    exit_codes: of the ranks that ended badly by themselves. A rank that was killed or raised comes before one that
    lost a connection, which is most often what another one's death looks like; among equals the first in time.
    """

    def order(rank: int) -> tuple[int, float]:
        error = raised.get(rank)
        if error is None:
            return (0, 0.0)
        return (1 if not error.is_lost_connection else 2, error.at_s)

    rank = min(sorted(exit_codes.keys() | raised.keys()), key=order)
    if rank in raised:
        return rank, raised[rank].error
    code = exit_codes[rank]
    return rank, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether the error may be the echo of another rank's death. It orders failures; it never changes their text."""
    text = str(error).lower()
    words = ("connection", "socket", "broken pipe", "gloo", "remote process", "peer")
    return isinstance(error, (RuntimeError, ConnectionError)) and any(word in text for word in words)


def error_line(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

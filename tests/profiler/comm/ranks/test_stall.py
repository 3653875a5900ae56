"""When ranks count as stalled, and whom that is blamed on."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.comm.ranks.mark import Doing, Mark, Phase, Progress
from profiler.comm.ranks.stall import SET_UP_LIMIT_S, find_stall

LIMIT_S = 60.0


def mark(since_s: float, doing: Doing = Doing.WORK, peer: int | None = None, phase: Phase = Phase.RUN) -> Mark:
    return Mark(pid=1, phase=phase, job=0, stage=0, round_index=3, doing=doing, peer=peer, since_s=since_s, until_s=0.0)


RECEIVES = Doing.RECEIVE


@pytest.mark.parametrize(
    ("marks", "stopped", "rank"),
    [
        ({0: mark(10), 1: mark(5, RECEIVES, 0)}, (), 0),  # 1 has waited longer, for 0
        ({0: mark(9, Doing.RETURN, 2), 1: mark(8, RECEIVES, 0), 2: mark(7)}, (), 2),
        ({0: mark(9), 1: mark(8)}, (1,), 1),  # both work, one is stopped
        ({0: mark(9), 1: mark(8)}, (), 1),
        ({0: mark(9, Doing.MEET), 1: mark(8, Doing.MEET), 2: mark(9.5)}, (), 2),
        ({0: mark(9, Doing.RETURN, 1), 1: mark(8, RECEIVES, 0)}, (), 1),  # a circle: the one that waits longest
    ],
)
def test_the_rank_that_others_wait_for_is_named(marks: dict[int, Mark], stopped: tuple[int, ...], rank: int) -> None:
    stall = find_stall(marks, now_s=71.0, limit_s=LIMIT_S, stopped=frozenset(stopped))
    assert stall is not None and stall.rank == rank
    assert ("is stopped (SIGSTOP)" in stall.error) is bool(stopped)


def test_while_one_moves_nobody_is_stalled() -> None:
    marks = {0: mark(20), 1: mark(5, RECEIVES, 0)}
    assert find_stall(marks, now_s=79.0, limit_s=LIMIT_S) is None
    assert find_stall(marks, now_s=81.0, limit_s=LIMIT_S) is not None


def test_loading_may_take_longer_than_a_round() -> None:
    marks = {0: mark(0, phase=Phase.LOAD), 1: mark(0, Doing.MEET)}
    assert find_stall(marks, now_s=SET_UP_LIMIT_S - 1, limit_s=LIMIT_S) is None
    assert find_stall(marks, now_s=SET_UP_LIMIT_S + 1, limit_s=LIMIT_S) is not None
    assert find_stall(marks, now_s=LIMIT_S + 1, limit_s=LIMIT_S, stopped=frozenset({0})) is not None


def test_expected_silence_is_no_stall(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress", pid=7)
    progress.enter(Phase.RUN, job=2)
    begun = progress.read().since_s
    progress.mark(1, 4, until_s=begun + 300.0)
    progress.wait(Doing.ARRIVAL)
    read = Progress.read_file(tmp_path / "progress")
    assert read is not None and read == progress.read()
    assert (read.pid, read.job, read.stage, read.round_index, str(read)) == (
        7,
        2,
        1,
        4,
        "waits for a request to arrive",
    )
    assert find_stall({0: read}, now_s=begun + 350.0, limit_s=LIMIT_S) is None
    assert find_stall({0: read}, now_s=begun + 361.0, limit_s=LIMIT_S) is not None


def test_a_file_that_is_not_there_or_not_whole_is_no_mark(tmp_path: Path) -> None:
    assert Progress.read_file(tmp_path / "none") is None
    (tmp_path / "short").write_bytes(b"1234")
    assert Progress.read_file(tmp_path / "short") is None

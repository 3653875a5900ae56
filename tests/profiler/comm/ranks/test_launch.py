"""Ranks of this machine: their results, their failures, their stalls, and that none outlives its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from profiler.comm.ranks.failure import RaisedError, RanksFailedError, first_failure
from profiler.comm.ranks.folder import run_folder, sweep_folders
from profiler.comm.ranks.launch import run_ranks
from tests.profiler.comm.ranks import workers

ROOT = Path(__file__).parents[4]


def run(function: Callable[..., object], *args: object, stall_timeout_s: float = 60.0) -> list[object]:
    return run_ranks(function, *args, world_size=2, device_type="cpu", num_threads=1, stall_timeout_s=stall_timeout_s)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_blocked(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))
    return bool(mask >> (number - 1) & 1)


def servers(launcher: int) -> list[int]:
    """The fork servers of a launcher: its ranks are their children."""
    return [pid for pid in children(launcher) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.timeout(120)
def test_results_come_in_rank_order() -> None:
    assert run(workers.own_rank, 5) == [0, 5]


@pytest.mark.timeout(120)
def test_what_was_reported_before_a_failure_is_kept() -> None:
    with pytest.raises(RanksFailedError, match=r"^rank 1: ArithmeticError: two and two are five$") as caught:
        run(workers.report_then_raise)
    assert caught.value.reports == {0: ["first"], 1: ["first"]}
    assert caught.value.failure.job == 1


@pytest.mark.timeout(120)
def test_an_error_that_speaks_of_connections_keeps_its_own_words() -> None:
    with pytest.raises(RanksFailedError, match=r"^rank 0: RuntimeError: NCCL error: unhandled cuda error, connection"):
        run(workers.nccl_error)


@pytest.mark.parametrize(
    ("codes", "raised", "rank", "error"),
    [
        ({1: -9}, {0: RaisedError(error="lost", at_s=1.0, is_lost_connection=True)}, 1, "killed by SIGKILL"),
        (
            {0: 1},
            {
                0: RaisedError(error="lost", at_s=1.0, is_lost_connection=True),
                2: RaisedError(error="ValueError: no", at_s=2.0, is_lost_connection=False),
            },
            2,
            "ValueError: no",
        ),
        ({0: 1}, {0: RaisedError(error="lost", at_s=1.0, is_lost_connection=True)}, 0, "lost"),
        ({2: 3}, {}, 2, "exited with code 3"),
    ],
)
def test_the_first_real_failure_is_blamed(
    codes: dict[int, int], raised: dict[int, RaisedError], rank: int, error: str
) -> None:
    assert first_failure(codes, raised) == (rank, error)


@pytest.mark.timeout(120)
def test_a_stopped_rank_is_named_with_what_it_did_and_all_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        RanksFailedError, match=r"rank 1, stage 1, round 4: is stopped \(SIGSTOP\) while it runs"
    ) as caught:
        run(workers.stop_in_round, stall_timeout_s=2.0)
    assert caught.value.failure.stacks is not None
    stacks = Path(caught.value.failure.stacks).read_text()
    assert "rank 0" in stacks and "in stop_in_round" in stacks and "waits for hidden states from rank 1" in stacks
    assert [path.name for path in tmp_path.iterdir()] == [Path(caught.value.failure.stacks).name]


@pytest.mark.timeout(120)
def test_a_rank_that_holds_pythons_lock_is_noticed_and_shows_its_stack() -> None:
    with pytest.raises(RanksFailedError, match=r"^rank 0, stage 0, round 0: runs; no rank moved for") as caught:
        run(workers.hold_the_lock, stall_timeout_s=2.0)
    path = Path(caught.value.failure.stacks or "")
    assert "in hold_the_lock" in path.read_text()
    path.unlink()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("delay_s", [0.2, 0.6, 1.5, None], ids=str)
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path, delay_s: float | None) -> None:
    """delay_s: seconds after the fork server's process is there; None is when all ranks run their function."""
    command = [sys.executable, "-m", "tests.profiler.comm.ranks.workers", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}) as launcher:
        wait_until(lambda: bool(servers(launcher.pid)), 60)
        if delay_s is None:
            wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2, 60)
        else:
            time.sleep(delay_s)
        pids = [pid for server in servers(launcher.pid) for pid in (server, *children(server))]
        assert delay_s is not None or len(pids) == 3
        launcher.kill()
        launcher.wait(10)
    # The server looks for its launcher once it has imported torch; on a busy machine that takes a while.
    wait_until(lambda: not any(map(is_alive, pids)), 60)
    assert list(tmp_path.glob("isochunk-*"))
    # The next launch sweeps what is left.
    done = subprocess.run(
        [sys.executable, "-c", "from profiler.comm.ranks.folder import sweep_folders; sweep_folders()"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and not list(tmp_path.glob("isochunk-*"))


def test_folders_in_use_are_not_swept() -> None:
    with run_folder() as folder:
        sweep_folders()
        assert folder.path.is_dir()
    assert not folder.path.exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_all_ranks_soon(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import signal, sys; from tests.profiler.comm.ranks import workers\n"
        "from profiler.comm.ranks.launch import run_ranks\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        f"run_ranks(workers.wait_for_ever, {str(tmp_path)!r}, world_size=2, device_type='cpu', num_threads=1)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True) as launcher:
        wait_until(lambda: len([path for path in tmp_path.glob("pid-*") if path.read_text()]) == 2, 60)
        pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
        assert all(is_blocked(pid, signal.SIGINT) for pid in pids)  # a terminal sends it to all; the launcher acts
        os.kill(pids[0], signal.SIGSTOP)  # as deaf as in a driver's call
        os.killpg(launcher.pid, number) if number is signal.SIGINT else launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=30)
        assert not any(map(is_alive, pids)) and "Process rank" not in errors

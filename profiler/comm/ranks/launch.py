"""Starts ranks on this machine, or joins torchrun's, watches them, and ends them all when one fails or stalls."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from db.errors import UserError
from profiler.comm.ranks import child
from profiler.comm.ranks.failure import RankFailure, RanksFailedError, first_failure
from profiler.comm.ranks.folder import RunFolder, read_whole, run_folder, sweep_folders, write_whole
from profiler.comm.ranks.mark import Mark, Progress
from profiler.comm.ranks.stall import LEAST_LIMIT_S, Stall, find_stall, is_stopped

PRELOADED = ("profiler.comm.ranks.fork_server", "profiler.comm.ranks.rank", "pydantic.type_adapter")
"""What the fork server imports before it forks ranks, beside the module of their function."""
_POLL_S = 0.1
_STALL_POLL_S = 1.0
_OTHERS_S = 0.3  # after a failure: what other ranks that failed at the same moment may take to say so
_TERMINATE_S = 1.5  # ranks may keep what they have before they are killed
_KILL_S = 2.0
_STACKS_S = 0.5


def under_torchrun() -> bool:
    """Whether this process is itself a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def is_first_process() -> bool:
    """Whether this process prints and writes files and rows: not on torchrun's ranks other than the first."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def run_ranks(
    function: Any,
    *args: Any,
    world_size: int,
    device_type: str,
    num_threads: int,
    stall_timeout_s: float = LEAST_LIMIT_S,
) -> list[Any]:
    """Run `function(context, *args)` on `world_size` ranks and return their results in rank order.

    The ranks are processes of this machine; under torchrun this process is one of the ranks, and each rank returns all
    results. `function` and its arguments must be picklable. Raises `RanksFailedError` for the first rank that died or
    raised, or for the one that all wait for when none moved for `stall_timeout_s`; all others have ended then.
    """
    if under_torchrun():
        from profiler.comm.ranks.torchrun import join_ranks

        started = int(os.environ["WORLD_SIZE"])
        if started != world_size:
            raise UserError("torchrun", f"{started} ranks", f"this plan takes {world_size}")
        return join_ranks(function, args, device_type, num_threads, stall_timeout_s)
    from torch._C._distributed_c10d import TCPStore

    from profiler.comm.ranks.rank import RankTask

    sweep_folders()
    with run_folder() as folder, socket.socket() as listener:
        # A socket of our own: the store's would listen on every interface.
        listener.bind(("127.0.0.1", 0))
        listener.listen(max(128, world_size))
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno()),
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        task = RankTask(
            function=function,
            args=args,
            world_size=world_size,
            device_type=device_type,
            num_threads=num_threads,
            store_port=port,
        )
        write_whole(folder.task, task)
        with _processes(folder, world_size, function.__module__) as processes:
            Supervisor(processes, folder, stall_timeout_s).run()
            del store  # only now: ranks leave their groups through it
            return [read_whole(folder.result(rank)) for rank in range(world_size)]


@contextmanager
def _processes(folder: RunFolder, world_size: int, module: str) -> Iterator[list[ForkServerProcess]]:
    """Processes of the ranks; none is left at the end, whatever ends it.

    They are forked from a server that has imported `PRELOADED` and `module`, and that runs nothing itself: imports of
    some 3 s of CPU time are paid once, not by each rank and each launch of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, module])
    processes = [
        context.Process(
            target=child.main, args=(str(folder.path), rank, dict(os.environ)), name=f"rank {rank}", daemon=True
        )
        for rank in range(world_size)
    ]
    try:
        # Blocked signals stay blocked in the server and its ranks: an interrupt is the launcher's to handle.
        # Starting the resource tracker unblocks them: it is started before.
        resource_tracker.ensure_running()
        with _blocked(signal.SIGINT, signal.SIGTERM):
            for process in processes:
                process.start()
        yield processes
    finally:
        with _blocked(signal.SIGINT, signal.SIGTERM):
            end_processes([process for process in processes if process.pid is not None])


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_processes(processes: list[ForkServerProcess]) -> None:
    """End ranks that still run: first asked, so that rows are kept, then killed."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + _TERMINATE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    deadline = time.monotonic() + _KILL_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


class Supervisor:
    """Waits for ranks that run, and raises for the first failure or a stall."""

    def __init__(self, processes: list[ForkServerProcess], folder: RunFolder, stall_timeout_s: float) -> None:
        self.processes, self.folder, self.stall_timeout_s = processes, folder, stall_timeout_s
        self.started_s = time.monotonic()

    def run(self) -> None:
        """Return when all ranks have ended well."""
        next_look = 0.0
        while running := [process for process in self.processes if process.is_alive()]:
            wait([process.sentinel for process in running], timeout=_POLL_S)
            if any(process.exitcode for process in self.processes):
                time.sleep(_OTHERS_S)
                raise self.failure()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + min(_STALL_POLL_S, self.stall_timeout_s / 4)
                if stall := self.stall():
                    raise self.stalled(stall)
        if any(process.exitcode for process in self.processes):
            raise self.failure()

    def failure(self) -> RanksFailedError:
        """The error of the rank that failed first."""
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes) if process.exitcode}
        errors = {rank: read_whole(self.folder.error(rank)) for rank in range(len(self.processes))}
        rank, error = first_failure(codes, {rank: raised for rank, raised in errors.items() if raised})
        return self._failed(rank, error, Progress.read_file(self.folder.progress(rank)))

    def marks(self) -> dict[int, Mark]:
        """The mark of each rank; a rank without one counts as starting since its launch."""
        found = {rank: Progress.read_file(self.folder.progress(rank)) for rank in range(len(self.processes))}
        return {
            rank: mark or Mark.starting(pid=self.processes[rank].pid or 0, since_s=self.started_s)
            for rank, mark in found.items()
            if self.processes[rank].is_alive()
        }

    def stall(self) -> Stall | None:
        """The stall of the ranks, if none moves any more."""
        marks, now = self.marks(), time.monotonic()
        stopped = frozenset(rank for rank, mark in marks.items() if is_stopped(mark.pid))
        return find_stall(marks, now_s=now, limit_s=self.stall_timeout_s, stopped=stopped)

    def stalled(self, stall: Stall) -> RanksFailedError:
        """The error of a stall; the stacks of all ranks are kept in a file."""
        path = self._keep_stacks()
        return self._failed(stall.rank, stall.error, stall.mark, stacks=str(path))

    def _failed(self, rank: int, error: str, mark: Mark | None, stacks: str | None = None) -> RanksFailedError:
        failure = RankFailure(
            rank=rank,
            error=error,
            stage=mark.stage if mark else None,
            round_index=mark.round_index if mark else None,
            job=mark.job if mark else 0,
            stacks=stacks,
        )
        return RanksFailedError(failure, read_reports(self.folder, len(self.processes)))

    def _keep_stacks(self) -> Path:
        marks = self.marks()
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)  # its handler is C's: it needs no lock of Python's
        time.sleep(_STACKS_S)
        path = Path(tempfile.gettempdir()) / f"isochunk-stall-{datetime.now():%Y%m%dT%H%M%S}-{os.getpid()}.txt"
        lines = []
        for rank, mark in marks.items():
            state = "stopped; " if is_stopped(mark.pid) else ""
            place = f"stage {mark.stage}, round {mark.round_index}: " if mark.stage is not None else ""
            since_s = time.monotonic() - mark.since_s
            lines.append(f"rank {rank} (process {mark.pid}): {state}{place}{mark}, for {since_s:.0f} s")
            stacks = self.folder.stacks(rank)
            lines.append(stacks.read_text() if stacks.exists() else "")
        path.write_text("\n".join(lines))
        return path


def read_reports(folder: RunFolder, world_size: int) -> Mapping[int, list[Any]]:
    """What each rank reported, in order."""
    found: dict[int, list[Any]] = {}
    for rank in range(world_size):
        found[rank] = []
        while (path := folder.report(rank, len(found[rank]))).exists():
            found[rank].append(read_whole(path))
    return found

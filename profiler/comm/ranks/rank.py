"""Runs a rank's function: joins the process group, updates the rank's mark, and writes its result or error."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from profiler.comm.ranks.failure import RaisedError, error_line, is_lost_connection
from profiler.comm.ranks.folder import RunFolder, read_whole, write_whole
from profiler.comm.ranks.mark import Phase, Progress

COLLECTIVE_TIMEOUT = timedelta(seconds=1800)
"""Backstop of torch's own: the watchdog ends a stall long before."""
# A lost connection is most often another rank's death: wait, so that the launcher sees that one first.
BLAME_OTHERS_S = 3.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Passed to a rank's function besides its arguments.

    report: hands a result to the launcher at once, so that it outlives a later failure.
    """

    rank: int
    world_size: int
    device: torch.device
    progress: Progress
    report: Callable[[object], None]


RankFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """The function that the launcher runs on its ranks; `function` and `args` must be picklable."""

    function: RankFunction
    args: tuple[Any, ...]
    world_size: int
    device_type: str
    num_threads: int
    store_port: int


class EndedBySignalError(RuntimeError):
    """The rank received SIGTERM."""


def run_child(path: Path, rank: int) -> None:
    """Run the task in the folder; the exit code tells the launcher how it went."""
    try:
        _run_task(RunFolder(path), rank)
    except EndedBySignalError:  # while another error was being noted: the launcher has one already
        os._exit(1)


def _run_task(folder: RunFolder, rank: int) -> None:
    progress = Progress(folder.progress(rank), pid=os.getpid())
    stacks = folder.stacks(rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        signal.signal(signal.SIGTERM, _end)
        task: RankTask = read_whole(folder.task)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task.world_size),
            "LOCAL_WORLD_SIZE": str(task.world_size), "GROUP_RANK": "0",
        }  # fmt: skip
        for library in ("GLOO", "NCCL"):  # all ranks are on this machine: nothing listens on another interface
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        store = TCPStore("127.0.0.1", task.store_port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
        numbers = iter(range(sys.maxsize))
        with process_group(
            progress,
            device_type=task.device_type,
            num_threads=task.num_threads,
            store=store,
            report=lambda value: write_whole(folder.report(rank, next(numbers)), value),
        ) as context:
            result = task.function(context, *task.args)
        write_whole(folder.result(rank), result)
    except BaseException as error:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the launcher's waits until the error is written
        lost = is_lost_connection(error)
        raised = RaisedError(error=error_line(error), at_s=time.monotonic(), is_lost_connection=lost)
        write_whole(folder.error(rank), raised)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if lost:
            time.sleep(BLAME_OTHERS_S)
        # Not raised: the group's teardown may block on ranks that are gone.
        os._exit(1)


def _end(signal_number: int, _frame: object) -> None:
    raise EndedBySignalError(f"ended by {signal.Signals(signal_number).name}")


@contextmanager
def process_group(
    progress: Progress,
    *,
    device_type: str,
    num_threads: int,
    report: Callable[[object], None],
    store: Store | None = None,
) -> Iterator[RankContext]:
    """Join the default process group (gloo on a CPU, NCCL on CUDA), and leave it when all went well.

    store: None takes torchrun's, from the environment.
    """
    progress.enter(Phase.GROUPS)
    torch.set_num_threads(num_threads)
    if device_type == "cpu":
        _keep_to_own_cores(num_threads)
    _keep_freed_memory()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # No device_id: eager initialisation would put all point-to-point traffic on one communicator (it serialises).
    backend = "nccl" if device.type == "cuda" else "gloo"
    world_size = int(os.environ["WORLD_SIZE"])
    if store is None:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    yield RankContext(rank=rank, world_size=world_size, device=device, progress=progress, report=report)
    progress.enter(Phase.END)
    dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Let the C library reuse large freed blocks instead of handing them back to the kernel.

    By default glibc maps and unmaps every tensor beyond 32 MiB anew, and each page is cleared again at its first use: a
    layer over 4096 tokens took 620 ms instead of 509, its element-wise part 94 instead of 32. Other C libraries have no
    such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _keep_to_own_cores(num_threads: int) -> None:
    """Where the ranks use all cores there are, each keeps to its own: its caches stay warm.

    With cores to spare the system's scheduler does better, and other jobs are left alone.
    """
    if not hasattr(os, "sched_setaffinity"):  # not on every system
        return
    cores = sorted(os.sched_getaffinity(0))
    first = int(os.environ["LOCAL_RANK"]) * num_threads
    if int(os.environ["LOCAL_WORLD_SIZE"]) * num_threads == len(cores):
        os.sched_setaffinity(0, cores[first : first + num_threads])

"""Starts ranks through torch's elastic launcher, or joins torchrun's, and ends them all when one fails."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from db.errors import UserError

RENDEZVOUS_TIMEOUT_S = 120
COLLECTIVE_TIMEOUT = timedelta(seconds=600)
# A lost connection is most often another rank's death: wait, so that the launcher sees that one first.
BLAME_OTHERS_S = 3.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """The first failure of a group of ranks; stage and round are None before the first round."""

    rank: int
    error: str
    stage: int | None = None
    round_index: int | None = None


class RanksFailedError(RuntimeError):
    """A rank died or raised; the others have been ended."""

    def __init__(self, failure: RankFailure) -> None:
        places = (("stage", failure.stage), ("round", failure.round_index))
        place = "".join(f", {name} {value}" for name, value in places if value is not None)
        super().__init__(f"rank {failure.rank}{place}: {failure.error}")
        self.failure = failure


class Progress:
    """Where a rank is, kept in a mapped file so that it outlives the rank: stage and round, -1 while unknown."""

    _LAYOUT = struct.Struct("qq")

    def __init__(self, path: Path) -> None:
        path.write_bytes(self._LAYOUT.pack(-1, -1))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def mark(self, stage: int, round_index: int) -> None:
        """Note that the rank begins `round_index` on `stage`."""
        self._LAYOUT.pack_into(self._map, 0, stage, round_index)

    @classmethod
    def read(cls, path: Path) -> tuple[int | None, int | None]:
        """The last mark in `path`."""
        if not path.exists():
            return None, None
        stage, round_index = cls._LAYOUT.unpack(path.read_bytes())
        return (stage if stage >= 0 else None), (round_index if round_index >= 0 else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What a rank's function is given besides its arguments."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    progress: Progress


RankFunction = Callable[..., Any]


def under_torchrun() -> bool:
    """Whether this process is itself a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def is_first_process() -> bool:
    """Whether this process speaks for the run: it prints, and writes files and rows. Of torchrun's ranks the first."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def run_ranks(function: RankFunction, *args: Any, world_size: int, device_type: str, num_threads: int) -> list[Any]:
    """Run `function(context, *args)` on `world_size` ranks and return their results in rank order.

    On this machine through torch's elastic launcher; under torchrun this process is one of the ranks, and each rank
    returns all results. `function` and its arguments must be picklable. Raises `RanksFailedError` for the
    first rank that died or raised, after all others have ended.
    """
    with TemporaryDirectory(prefix="isochunk-") as folder:
        if under_torchrun():
            return _join_ranks(function, args, world_size, device_type, num_threads, Path(folder))
        return _launch_ranks(function, args, world_size, device_type, num_threads, Path(folder))


def _launch_ranks(
    function: RankFunction, args: tuple[Any, ...], world_size: int, device_type: str, num_threads: int, folder: Path
) -> list[Any]:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"timeout": RENDEZVOUS_TIMEOUT_S},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, _rank_main)(function, args, device_type, num_threads, str(folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RanksFailedError(_failure(folder, rank, failure.exitcode)) from None
    except SignalException as stop:
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stop.sigval) from None
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _join_ranks(
    function: RankFunction, args: tuple[Any, ...], world_size: int, device_type: str, num_threads: int, folder: Path
) -> list[Any]:
    started = int(os.environ["WORLD_SIZE"])
    if started != world_size:
        raise UserError("torchrun", f"{started} ranks", f"this plan takes {world_size}")
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, _end_for_torchrun)
    try:
        with _process_group(rank, device_type, num_threads, folder) as context:
            result = function(context, *args)
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, result, group=dist.new_group(backend="gloo"))
    except Exception as error:
        stage, round_index = Progress.read(folder / f"progress-{rank}")
        failure = RankFailure(rank=rank, error=_error_line(error), stage=stage, round_index=round_index)
        raise RanksFailedError(failure) from error
    return gathered


def _end_for_torchrun(_signal: int, _frame: object) -> None:
    """Raised and not obeyed at once, so that the caller can say in its rows that the run failed."""
    raise SystemExit("ended by torchrun: another rank failed")


def _rank_main(function: RankFunction, args: tuple[Any, ...], device_type: str, num_threads: int, folder: str) -> None:
    rank = int(os.environ["RANK"])
    try:
        with _process_group(rank, device_type, num_threads, Path(folder)) as context:
            result = function(context, *args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException as error:
        if _is_lost_connection(error):
            time.sleep(BLAME_OTHERS_S)
        (Path(folder) / f"error-{rank}").write_text(_error_line(error))
        # Not raised: the group's teardown may block on ranks that are gone.
        os._exit(1)


@contextmanager
def _process_group(rank: int, device_type: str, num_threads: int, folder: Path) -> Iterator[RankContext]:
    """Join the default process group (gloo on a CPU, NCCL on CUDA), and leave it when all went well."""
    torch.set_num_threads(num_threads)
    if device_type == "cpu":
        _keep_to_own_cores(num_threads)
    _keep_freed_memory()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # No device_id: eager initialisation would put all point-to-point traffic on one communicator (it serialises).
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    progress = Progress(folder / f"progress-{rank}")
    yield RankContext(
        rank=rank, local_rank=local_rank, world_size=dist.get_world_size(), device=device, progress=progress
    )
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


def _error_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return f"lost the connection to another rank ({line})" if _is_lost_connection(error) else line


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


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (RuntimeError, ConnectionError)) and any(
        word in text for word in ("connection", "gloo", "nccl", "socket", "peer", "broken pipe")
    )


def _failure(folder: Path, rank: int, exit_code: int) -> RankFailure:
    path = folder / f"error-{rank}"
    if path.exists():
        error = path.read_text()
    elif exit_code < 0:
        error = f"killed by {signal.Signals(-exit_code).name}"
    else:
        error = f"exited with code {exit_code}"
    stage, round_index = Progress.read(folder / f"progress-{rank}")
    return RankFailure(rank=rank, error=error, stage=stage, round_index=round_index)

"""Ranks that torchrun started, on one host or several: each rank watches itself.

torchrun ends all ranks when one exits, but does not detect ranks that hang. So each rank has a thread that ends it
when its own mark has not moved for too long, and behind that a timer of C's, which fires even while some call holds
Python's lock.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from profiler.comm.ranks.failure import RankFailure, RanksFailedError, error_line
from profiler.comm.ranks.folder import run_folder
from profiler.comm.ranks.mark import Phase, Progress
from profiler.comm.ranks.rank import process_group
from profiler.comm.ranks.stall import SET_UP_LIMIT_S, find_stall

_LOOK_EVERY_S = 1.0
_LATER_S = 30.0  # the timer of C's fires so long after the thread should have


def join_ranks(
    function: Any, args: tuple[Any, ...], device_type: str, num_threads: int, stall_timeout_s: float
) -> list[Any]:
    """Run `function` as one of torchrun's ranks and return the results of all."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, _end)
    with run_folder() as folder:
        progress = Progress(folder.progress(rank), pid=os.getpid())
        watch = Watch(progress, rank, stall_timeout_s)
        watch.start()
        try:
            with process_group(
                progress, device_type=device_type, num_threads=num_threads, report=lambda _value: None
            ) as context:
                result = function(context, *args)
                gathered: list[Any] = [None] * world_size
                dist.all_gather_object(gathered, result, group=dist.new_group(backend="gloo"))
        except Exception as error:
            mark = progress.read()
            failure = RankFailure(
                rank=rank, error=error_line(error), stage=mark.stage, round_index=mark.round_index, job=mark.job
            )
            raise RanksFailedError(failure) from error
        finally:
            watch.stop()
    return gathered


def _end(_signal: int, _frame: object) -> None:
    """Raised instead of exiting at once, so that the caller can mark the run as failed."""
    raise SystemExit("ended by torchrun: another rank failed")


class Watch(threading.Thread):
    """Ends this process when its mark has not moved for the limit of its phase."""

    def __init__(self, progress: Progress, rank: int, stall_timeout_s: float) -> None:
        super().__init__(daemon=True, name="watch")
        self.progress, self.rank, self.stall_timeout_s = progress, rank, stall_timeout_s
        self._ended = threading.Event()

    def run(self) -> None:
        """Check periodically, and restart the timer each time."""
        while not self._ended.wait(min(_LOOK_EVERY_S, self.stall_timeout_s / 4)):
            faulthandler.dump_traceback_later(max(SET_UP_LIMIT_S, self.stall_timeout_s) + _LATER_S, exit=True)
            mark = self.progress.read()
            if mark.phase is Phase.END:
                continue
            stall = find_stall({self.rank: mark}, now_s=time.monotonic(), limit_s=self.stall_timeout_s)
            if stall is None:
                continue
            path = Path(tempfile.gettempdir()) / f"isochunk-stall-{os.getpid()}.txt"
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            place = f", stage {mark.stage}, round {mark.round_index}" if mark.stage is not None else ""
            print(f"Error: rank {self.rank}{place}: {stall.error}; stacks in {path}", file=sys.stderr, flush=True)
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        """The rank has ended."""
        self._ended.set()
        self.join()

"""Functions that tests run on ranks. They import nothing heavy beyond what ranks do."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.mark import Doing, Phase
from profiler.comm.ranks.rank import RankContext


def own_rank(context: RankContext, factor: int) -> int:
    context.report(("on the way", context.rank))
    return factor * context.rank


def report_then_raise(context: RankContext) -> None:
    context.report("first")
    if context.rank == 1:
        context.progress.enter(Phase.RUN, job=1)
        raise ArithmeticError("two and two are five")
    dist.barrier()


def nccl_error(context: RankContext) -> None:
    if context.rank == 0:
        raise RuntimeError("NCCL error: unhandled cuda error, connection refused by peer")
    time.sleep(60)


def stop_in_round(context: RankContext) -> None:
    """Rank 1 stops itself in round 4; rank 0 waits for it."""
    context.progress.enter(Phase.RUN)
    context.progress.mark(context.rank, 4)
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    context.progress.wait(Doing.RECEIVE, 1)
    time.sleep(300)


def hold_the_lock(context: RankContext) -> None:
    """Rank 0 never gives up Python's lock, as a call of C's may: no thread of it runs any more."""
    context.progress.enter(Phase.RUN)
    context.progress.mark(0, 0)
    if context.rank == 0:
        sys.setswitchinterval(1e6)
        while True:
            pass
    context.progress.wait(Doing.RECEIVE, 0)
    time.sleep(300)


def wait_for_ever(context: RankContext, folder: str) -> None:
    (Path(folder) / f"pid-{context.rank}").write_text(str(os.getpid()))
    time.sleep(300)


if __name__ == "__main__":
    run_ranks(wait_for_ever, sys.argv[1], world_size=2, device_type="cpu", num_threads=1)

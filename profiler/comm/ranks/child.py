"""A rank's process: bound to its launcher's life from its first instruction on, before anything heavy is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main(folder: str, rank: int, launcher_pid: int) -> None:
    """Run the function that lies in `folder` as rank `rank`; the launcher starts this in a new process."""
    die_with(launcher_pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    from profiler.comm.ranks.rank import run_child  # torch: seconds

    run_child(Path(folder), rank)


def die_with(launcher_pid: int) -> None:
    """End this process when its launcher ends, however that happens (Linux; a signal of the kernel's)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:  # it died before the line above
        os._exit(1)

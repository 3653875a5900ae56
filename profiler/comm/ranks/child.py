"""A rank's process: it ends when its launcher ends, from its first instruction on."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import parent_process
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def main(folder: str, rank: int, environment: Mapping[str, str]) -> None:
    """Run the function that lies in `folder` as rank `rank`, with the launcher's environment.

    Forked from the fork server, which ends with the launcher: the kernel ends this process with the server.
    """
    die_with(os.getppid())
    launcher = parent_process()
    if launcher is None or not launcher.is_alive():  # it died before the line above
        os._exit(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"isochunk-r{rank}".encode())  # what ps and top show
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    from profiler.comm.ranks.rank import run_child  # torch: seconds, where the server has not imported it

    gc.freeze()  # what the imports made: collections walk what the rank makes
    run_child(Path(folder), rank)


def die_with(parent_pid: int) -> None:
    """End this process when its parent ends, however that happens (Linux; a signal of the kernel's)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)

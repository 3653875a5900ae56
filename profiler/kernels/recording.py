"""Work recorded once and replayed: a CUDA graph where there is a card, the plain call elsewhere.

A layer takes the host some 0.3 to 0.5 ms to launch and a short round's kernels less than that: replayed, a whole round
is one launch, and its kernels follow one another without a gap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Scratch = Any  # torch's own handle of a memory pool


class Recording(Generic[T]):
    """A captured graph; what it reads and writes stays alive with it."""

    def __init__(self, work: Callable[[], T], device: torch.device, scratch: Scratch) -> None:
        self.work, self.graph = work, torch.cuda.CUDAGraph()
        stream = _capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # thread_local: NCCL's watchdog asks for events while other threads capture.
            self.graph.capture_begin(pool=scratch, capture_error_mode="thread_local")
            try:
                self.result = work()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is broken is not the cause
                    self.graph.capture_end()
                raise
            self.graph.capture_end()

    def __call__(self) -> T:
        """Replay; the result's tensors are those of the capture, written anew."""
        self.graph.replay()
        return self.result


def new_scratch(device: torch.device) -> Scratch:
    """Memory for what recorded work allocates; free again when the last recording that uses it is gone."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def record(work: Callable[[], T], device: torch.device, scratch: Scratch) -> Callable[[], T]:
    """Make `work` replayable on `device`.

    On CUDA the work is captured, not run: it must have run before (libraries build kernels and connections the first
    time), use the same memory each time, and never wait for the host. Recordings that share their scratch memory must
    be replayed one after another on one stream. On a CPU the work itself comes back.
    """
    return Recording(work, device, scratch) if device.type == "cuda" else work


def can_record(work: Callable[[], object], device: torch.device) -> bool:
    """Whether work that is not of this project can be recorded: nothing in it waits for the host. It runs once."""
    work()
    try:
        record(work, device, new_scratch(device))
    except RuntimeError:
        torch.cuda.synchronize(device)
        return False
    return True


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

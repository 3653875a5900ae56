"""Detects interference on a CPU core by timing a small fixed product between the samples of a measurement."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import torch

_SIZE = 192  # operands that fit beside others in a core's own cache
_REPEATS = 3  # some 0.4 ms in all
_SLOW = 1.15
_REMEMBERED = 1000
_RECKONED_EVERY = 50


class CpuInterference:
    """Called on a CPU it runs the product and says whether that was slow.

    Another process on the core, a neighbour on its second thread and a hypervisor's other guests all show, however
    steady they make the samples in between.
    """

    def __init__(self) -> None:
        self.left, self.right = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
        self.out = torch.empty(_SIZE, _SIZE)
        self.times: deque[float] = deque(maxlen=_REMEMBERED)
        self.usual_s = float("inf")
        self.count = 0
        for _ in range(_RECKONED_EVERY):
            self()

    def __call__(self) -> bool:
        """Whether the core is slower than usual now; usual is what the better third of all calls so far took."""
        start = time.perf_counter()
        for _ in range(_REPEATS):
            torch.mm(self.left, self.right, out=self.out)
        elapsed_s = time.perf_counter() - start
        self.times.append(elapsed_s)
        self.count += 1
        if self.count % _RECKONED_EVERY == 0:
            self.usual_s = float(np.percentile(self.times, 33))
        return elapsed_s > _SLOW * self.usual_s

"""The time of work and a message that overlap on one card, and the exposed part of the message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tuner.fit.curve import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Both begin together; each loses a share of the time that the other takes alone.

    together = max(work + work_loss * message, message + message_loss * work)

    A loss of 0 is work that the other does not touch, of 1 work that waits until the other has ended.
    """

    work_loss: float
    message_loss: float

    @classmethod
    def of_stretches(cls, *, work: float, message: float) -> Self:
        """The losses behind measured stretches: the time of each beside the other over its time alone, at least 1.

        While a message lasts, `message` times as long as alone, the work goes at 1 / `work` of its rate.
        """
        work, message = max(work, 1.0), max(message, 1.0)
        return cls(
            work_loss=min(message * (1.0 - 1.0 / work), 1.0), message_loss=min(work * (1.0 - 1.0 / message), 1.0)
        )

    def together(self, work_s: Floats, message_s: Floats) -> Floats:
        """Seconds until both have ended."""
        seconds: Floats = np.maximum(work_s + self.work_loss * message_s, message_s + self.message_loss * work_s)
        return seconds

    def exposed(self, work_s: Floats, message_s: Floats) -> Floats:
        """Seconds that the message adds to the work."""
        return self.together(work_s, message_s) - work_s


APART = Overlap(work_loss=1.0, message_loss=1.0)
"""One after the other: on a CPU the threads that compute are those that send."""

COPIED = Overlap(work_loss=0.0, message_loss=0.0)
"""Moved by copy engines: products are bound by arithmetic and leave most of the memory's rate."""

# Where nothing was measured beside work. NCCL's kernels hold up to 24 of an H100's 132 multiprocessors while they run
# (one a channel): products then take 132 / 108 as long. How much a message loses to the memory traffic of a product is
# an assumption, between the 1.0 of copy engines and the 1.5 that messages through kernels reach beside attention.
ON_A_CARD = Overlap.of_stretches(work=132 / 108, message=1.2)

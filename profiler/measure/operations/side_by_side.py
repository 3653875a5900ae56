"""Work timed while other work goes on beside it on the same card: a collective and the products of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from profiler.measure.timing import Prepared, Run

OUTLASTS = 1.5  # times as long as the work that is timed the other goes on, by their times alone


def num_calls(mine_s: float, other_s: float) -> int:
    """Calls of the other work that outlast one of the timed work."""
    return max(1, math.ceil(OUTLASTS * mine_s / other_s))


def beside_products(collective: Prepared, product: Run, *, calls: int, device: torch.device) -> Prepared:
    """A collective with products on another queue: it begins first, as a gather does that a projection hides."""
    queue = _Queue(device)

    def run(call: int) -> None:
        begin = queue.after_what_came()
        collective.run(call)
        begin(lambda: [product(calls * call + index) for index in range(calls)])

    return replace(collective, run=run, recordable=False)


def beside_collectives(product: Run, collective: Prepared, *, calls: int, device: torch.device) -> Prepared:
    """A product with collectives on another queue, which begin first; every rank of a group times it at once."""
    queue = _Queue(device)

    def run(call: int) -> None:
        begin = queue.after_what_came()
        begin(lambda: [collective.run(index) for index in range(calls)])
        product(call)

    # The ranks' cards run their products in step, as their collectives make them.
    return Prepared(run=run, waits=True, recordable=False, in_step=collective.in_step, follows_clock=True)


class _Queue:
    """A queue of the card beside the current one; on a CPU there is none, and one thing comes after the other."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_what_came(self) -> Callable[[Callable[[], object]], None]:
        """Note where the current queue is; what it returns puts work on the other queue that begins from there."""
        stream = self.stream
        reached = None if stream is None else torch.cuda.current_stream().record_event()

        def begin(work: Callable[[], object]) -> None:
            if stream is None or reached is None:
                work()
                return
            stream.wait_event(reached)
            with torch.cuda.stream(stream):
                work()

        return begin

"""What a rank queues on its card in the model of the links."""

from __future__ import annotations

from dataclasses import dataclass

Label = tuple[int, int]  # group, and how often it has run: in a group rounds run in order, over passes and steps
Counter_ = tuple[str, int, int, int]  # kind, rank in whose memory it lies, lane, the other rank


@dataclass(slots=True, eq=False)
class Work:
    """One queued command. Only what its kind needs is set."""

    kind: str  # mark, wait_mark, wait, write, copy, compute
    queue: int
    counter: Counter_ | None = None
    value: int = 0
    target: int = -1
    lane: int = -1
    slot: int = -1  # copy: the receiver's; compute: read from in `lane`, -1 for none
    staging: tuple[int, int] | None = None  # target and slot. compute: written to, copy: read from
    label: Label | None = None  # compute: the task; copy: the task whose hidden states it takes
    waits_for_host: bool = False  # the host queues it only when all before is done

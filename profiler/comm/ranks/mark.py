"""A rank's current activity and the peer it waits for, in a mapped file that can be read while the rank hangs."""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Phase(IntEnum):
    """Phases of a rank, in order."""

    START = 0
    GROUPS = 1
    LOAD = 2
    LINKS = 3
    WARM_UP = 4
    RECORD = 5
    RUN = 6
    DECODE = 7
    END = 8

    @property
    def is_set_up(self) -> bool:
        """Whether the phase loads, compiles or connects: steps that may take minutes."""
        return self not in (Phase.RUN, Phase.DECODE)


class Doing(IntEnum):
    """A rank's current activity. All but the first are waits, most of them for a peer."""

    WORK = 0
    RECEIVE = 1
    RETURN = 2
    ARRIVAL = 3
    MEET = 4


_PHASES = {
    Phase.START: "starts",
    Phase.GROUPS: "makes its process groups",
    Phase.LOAD: "loads weights",
    Phase.LINKS: "connects to its neighbours",
    Phase.WARM_UP: "warms up",
    Phase.RECORD: "records its rounds",
    Phase.RUN: "runs",
    Phase.DECODE: "decodes",
    Phase.END: "ends",
}
_WAITS = {
    Doing.RECEIVE: "waits for hidden states from rank {peer}",
    Doing.RETURN: "waits for the last stage, rank {peer}",
    Doing.ARRIVAL: "waits for a request to arrive",
    Doing.MEET: "waits for all ranks",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One reading of a rank's file. Unknown stages, rounds and peers are None.

    job: index of the plan among those of the launch. since_s, until_s: `time.monotonic()`, one clock for all processes
    of a host, when this began and until when silence is expected.
    """

    pid: int
    phase: Phase
    job: int
    stage: int | None
    round_index: int | None
    doing: Doing
    peer: int | None
    since_s: float
    until_s: float

    @classmethod
    def starting(cls, *, pid: int, since_s: float) -> Mark:
        """The mark of a rank that has not written one yet."""
        return cls(
            pid=pid, phase=Phase.START, job=0, stage=None, round_index=None, doing=Doing.WORK, peer=None,
            since_s=since_s, until_s=0.0,
        )  # fmt: skip

    def __str__(self) -> str:
        """The activity in words, for an error line."""
        doing = _WAITS.get(self.doing, "").format(peer=self.peer)
        return doing or _PHASES[self.phase]


class Progress:
    """The writer's side: one rank's file."""

    _LAYOUT = struct.Struct("<7q2d")

    def __init__(self, path: Path, *, pid: int) -> None:
        self._fields = [pid, Phase.START, 0, -1, -1, Doing.WORK, -1]
        self._until_s = 0.0
        if not path.exists():
            path.write_bytes(bytes(self._LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self._LAYOUT.size)
        self._write()

    def enter(self, phase: Phase, *, job: int | None = None) -> None:
        """A phase begins; `job` where the launch runs several plans."""
        self._fields[1] = phase
        if job is not None:
            self._fields[2] = job
        self._fields[4:7] = [-1, Doing.WORK, -1]
        self._until_s = 0.0
        self._write()

    def mark(self, stage: int, round_index: int, *, until_s: float = 0.0) -> None:
        """The rank starts `round_index` on `stage`; it does not count as stalled before `until_s`."""
        self._fields[3:7] = [stage, round_index, Doing.WORK, -1]
        self._until_s = until_s
        self._write()

    def wait(self, doing: Doing, peer: int | None = None) -> None:
        """The rank begins to wait."""
        self._fields[5:7] = [doing, -1 if peer is None else peer]
        self._write()

    def work(self) -> None:
        """The rank's wait is over, or it made progress in the same work."""
        self._fields[5:7] = [Doing.WORK, -1]
        self._write()

    def read(self) -> Mark:
        """This rank's own mark."""
        return _unpack(self._LAYOUT.unpack_from(self._map))

    def _write(self) -> None:
        self._LAYOUT.pack_into(self._map, 0, *self._fields, time.monotonic(), self._until_s)

    @classmethod
    def read_file(cls, path: Path) -> Mark | None:
        """The mark in `path`; None before the rank made it."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if len(content) != cls._LAYOUT.size:
            return None
        mark = _unpack(cls._LAYOUT.unpack(content))
        return mark if mark.pid else None


def _unpack(values: tuple[int | float, ...]) -> Mark:
    pid, phase, job, stage, round_index, doing, peer = map(int, values[:7])
    return Mark(
        pid=pid,
        phase=Phase(phase),
        job=job,
        stage=stage if stage >= 0 else None,
        round_index=round_index if round_index >= 0 else None,
        doing=Doing(doing),
        peer=peer if peer >= 0 else None,
        since_s=float(values[7]),
        until_s=float(values[8]),
    )

"""The real pipeline and its real peer links over a memory that only notes what is asked of it, and a card that does the
noted work in any order that its queues allow: `python -m tests.runtime.run.link_model 10000`.

What a rank queues does not depend on data, so it is noted once; then schedules are drawn. A schedule fails when nothing
can go on before all is done, when a round reads what is not its own, or when something is overwritten that is still
being read or written.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest import mock

import torch

from profiler.comm.links import peer_link
from profiler.comm.links.boundary import Links
from profiler.comm.links.group import Groups, Pair, RankGroup
from profiler.comm.links.mesh import Transport
from profiler.comm.links.peer_link import HIDDEN, PeerInbound, PeerOutbound, PeerReturn
from profiler.comm.links.peer_memory import Queue
from profiler.comm.ranks.mark import Progress
from profiler.sequence.kind import SequenceCut
from runtime.job.job import Job
from runtime.job.place import Place
from runtime.run import pipeline as pipeline_module
from runtime.run.pipeline import Pipeline
from runtime.stage.share import RoundShare
from tuner.plan.plan import Chunk, Parallel, Request, Round

WIDTH = 1
CPU = torch.device("cpu")
PUSHED, FREED = "pushed", "freed"
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
    slot: int = -1  # copy: the receiver's; compute: read from, -1 for none
    staging: int = -1  # compute: written to, copy: read from; -1 for none
    number: int = -1  # of the message or round, over all passes
    waits_for_host: bool = False  # the host queues it only when all before is done


@dataclass(slots=True)
class FakeQueue:
    rank: FakeRank
    number: int

    def mark(self) -> object:
        work = Work("mark", self.number)
        self.rank.program.append(work)
        return work

    def wait_for(self, moment: object) -> None:
        self.rank.program.append(Work("wait_mark", self.number, value=self.rank.program.index(cast(Work, moment))))


@dataclass(slots=True)
class FakeRank:
    """A rank's memory, stage and clock: all that its pipeline touches. See `profiler.comm.links.peer_memory.Memory`."""

    rank: int
    slots: int
    max_tokens: int
    program: list[Work] = field(default_factory=list)
    num_queues: int = 1
    rounds_run: int = 0
    copies: Counter[int] = field(default_factory=Counter)
    boxes: list[torch.Tensor] = field(default_factory=list)
    staging: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    read_slot: int = -1
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    origin_s: float = 0.0
    syncs: random.Random | None = None

    def __post_init__(self) -> None:
        self.boxes = [torch.zeros(self.slots, self.max_tokens, WIDTH), torch.zeros(self.slots, 8, 1).long()]
        self.staging = torch.zeros(self.slots, self.max_tokens, WIDTH)

    # Memory
    def inbox(self, lane: int) -> torch.Tensor:
        return self.boxes[lane]

    def current_queue(self) -> Queue:
        return FakeQueue(self, 0)

    def new_queue(self) -> Queue:
        self.num_queues += 1
        return FakeQueue(self, self.num_queues - 1)

    def copy(self, queue: Queue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        staging = self._slot_of(self.staging, source) if lane == HIDDEN else -1
        number, self.copies[lane] = self.copies[lane], self.copies[lane] + 1
        self._add(queue, "copy", target=receiver, lane=lane, slot=slot, staging=staging, number=number)

    def pushed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        self._add(queue, "write", counter=(PUSHED, receiver, lane, self.rank), value=count)

    def wait_pushed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        self._add(queue, "wait", counter=(PUSHED, self.rank, lane, sender), value=count)

    def freed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        self._add(queue, "write", counter=(FREED, sender, lane, self.rank), value=count)

    def wait_freed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        self._add(queue, "wait", counter=(FREED, self.rank, lane, receiver), value=count)

    # Clock: a round is one command
    def start(self) -> None:
        self.read_slot = -1

    def finish(self) -> None:
        written = self.rounds_run
        waits = self.syncs is not None and self.syncs.random() < 0.2
        self._add(FakeQueue(self, 0), "compute", slot=self.read_slot, staging=self.written_slot, number=written)
        self.program[-1].waits_for_host = waits
        self.rounds_run += 1
        self.written_slot = -1

    written_slot: int = -1

    # Stage
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ids.shape[0], WIDTH)

    def forward(self, _chunks: object, hidden: torch.Tensor) -> torch.Tensor:
        self.read_slot = self._slot_of(self.boxes[HIDDEN], hidden)
        return hidden.clone()

    def forward_step(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.forward((), hidden)

    def final_requests(self, _share: object) -> list[int]:
        return []

    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape[0]).long()

    def restart(self) -> None: ...

    @property
    def scheme(self) -> FakeRank:
        return self

    @property
    def step(self) -> FakeRank:
        return self

    def use(self, _group: object) -> None: ...

    def gathered_numbers(self, _num_rows: int) -> int:
        return 0

    def share(self, chunks: Round, cut: SequenceCut) -> RoundShare:
        return RoundShare.of(chunks, cut, size=1, rank=0)

    def warm_up(self, _rounds: object) -> None: ...

    def _add(self, queue: Queue, kind: str, **values: Any) -> None:
        self.program.append(Work(kind, cast(FakeQueue, queue).number, **values))

    def _slot_of(self, slots: torch.Tensor, part: torch.Tensor) -> int:
        offset = part.data_ptr() - slots.data_ptr()
        return offset // (slots[0].numel() * slots.element_size()) if 0 <= offset < slots.nbytes else -1


class NotedOutbound(PeerOutbound):
    """Notes where a round lays what it sends."""

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        memory = cast(FakeRank, self.memory)
        memory.written_slot = index % memory.slots
        return super().buffer(index, num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: stages, slots, window, tokens of each round, passes over them, and steps of decode after."""

    pp_size: int
    slots: int
    window: int | None
    round_tokens: tuple[int, ...]
    num_passes: int
    decode_steps: int
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Case:
        """A random one."""
        draw = random.Random(seed)
        pp_size = draw.randint(2, 8)
        return cls(
            pp_size=pp_size,
            slots=draw.choice([1, 2, 2, 3]),
            window=draw.choice([None, *range(1, pp_size + 2)]),
            round_tokens=tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 7))),
            num_passes=draw.randint(1, 3),
            decode_steps=draw.randint(0, 3),
            seed=seed,
        )

    def programs(self, *, host_waits: bool) -> list[list[Work]]:
        """What the pipeline of each rank queues."""
        job = self._job()
        syncs = random.Random(self.seed) if host_waits else None
        ranks = [FakeRank(rank, self.slots, 8, syncs=syncs) for rank in range(self.pp_size)]
        with TemporaryDirectory() as folder, mock.patch.object(peer_link, "SLOTS", self.slots):
            for rank in ranks:
                links = self._links(rank)
                place = Place.of(rank.rank, job.parallel)
                with mock.patch.object(pipeline_module, "make_links", lambda *_: links):  # noqa: B023 - called at once
                    made: Any = rank
                    progress = Progress(Path(folder) / f"progress-{rank.rank}", pid=1)
                    pipeline = Pipeline(job, place, self._groups(rank.rank), made, made, progress)
                pipeline.warm_up()
                for _ in range(self.num_passes):
                    pipeline.prefill()
                if self.decode_steps:
                    pipeline.decode(self.decode_steps)
        return [rank.program for rank in ranks]

    def _job(self) -> Job:
        total = sum(self.round_tokens)
        starts = [sum(self.round_tokens[:index]) for index in range(len(self.round_tokens))]
        shape: Any = mock.Mock(hidden_size=WIDTH)
        kernels: Any = None
        return Job(
            shape=shape,
            parallel=Parallel(tp_size=1, pp_size=self.pp_size, layer_partition=(1,) * self.pp_size),
            requests=(Request(id="r0", prompt_tokens=total),),
            rounds=tuple((Chunk(0, start, tokens),) for start, tokens in zip(starts, self.round_tokens, strict=True)),
            window=self.window,
            prompts=((0,) * total,),
            weights=None,
            dtype="float32",
            max_new_tokens=1,
            repeat=1,
            kernels=kernels,
        )

    def _links(self, rank: FakeRank) -> Links:
        last = self.pp_size - 1
        inbound = PeerInbound(rank, rank.rank - 1) if rank.rank else None
        outbound = NotedOutbound(rank, rank.rank + 1, rank.staging) if rank.rank < last else None
        back = PeerReturn(rank, last - rank.rank) if rank.rank in (0, last) else None
        return Links(inbound=inbound, outbound=outbound, back=back)

    def _groups(self, rank: int) -> Groups:
        def pair(peer: int) -> Pair | None:
            is_there = 0 <= peer < self.pp_size
            return Pair(peer=peer, transport=Transport.PEER_MEMORY, group=None) if is_there else None

        everyone: Any = None
        back = pair(self.pp_size - 1 - rank) if rank in (0, self.pp_size - 1) else None
        return Groups(
            tensor=RankGroup(), sequence=RankGroup(), sequence_ranks=(rank,), inbound=pair(rank - 1),
            outbound=pair(rank + 1), back=back, everyone=everyone, sharing=None,
        )  # fmt: skip


class Schedule:
    """Runs programs one command, or half of one, at a time, in random order.

    serial: each card does all its queues' work in the order in which it was queued.
    """

    def __init__(self, programs: Sequence[Sequence[Work]], *, seed: int, serial: bool) -> None:
        self.programs, self.serial, self.random = programs, serial, random.Random(seed)
        self.done = [[False] * len(program) for program in programs]
        self.num_done = [0] * len(programs)  # all before it is done
        self.half_done: set[tuple[int, int]] = set()
        self.counters: dict[Counter_, int] = defaultdict(int)
        self.queues = [self._queues(program) for program in programs]
        self.inbox: dict[tuple[int, int, int], int] = {}  # rank, lane, slot -> message that lies there
        self.staged: dict[tuple[int, int], int] = {}  # rank, slot -> round that lies there
        self.users: Counter[tuple[object, ...]] = Counter()  # places that are being read (> 0) or written (< 0)

    def run(self) -> None:
        """Run to the end. Raises AssertionError for a deadlock or wrong data."""
        while True:
            ready = [item for item in self._heads() if self._is_ready(*item)]
            if not ready:
                break
            self._advance(*self.random.choice(ready))
        left = [(rank, work) for rank, queues in enumerate(self.queues) for queue in queues for work in queue[:1]]
        assert not left, f"nothing can go on: {[(rank, self.programs[rank][index]) for rank, index in left]}"

    def _queues(self, program: Sequence[Work]) -> list[list[int]]:
        if self.serial:
            return [list(range(len(program)))]
        by_queue: dict[int, list[int]] = defaultdict(list)
        for index, work in enumerate(program):
            by_queue[work.queue].append(index)
        return list(by_queue.values())

    def _heads(self) -> Iterator[tuple[int, int]]:
        for rank, queues in enumerate(self.queues):
            for queue in queues:
                if queue:
                    yield rank, queue[0]

    def _is_ready(self, rank: int, index: int) -> bool:
        work, done = self.programs[rank][index], self.done[rank]
        while self.num_done[rank] < len(done) and done[self.num_done[rank]]:
            self.num_done[rank] += 1
        barrier = next(
            (at for at in range(self.num_done[rank], index + 1) if self.programs[rank][at].waits_for_host), None
        )
        if barrier is not None and self.num_done[rank] < barrier:
            return False
        if work.kind == "wait":
            assert work.counter is not None
            return self.counters[work.counter] >= work.value
        return done[work.value] if work.kind == "wait_mark" else True

    def _advance(self, rank: int, index: int) -> None:
        work = self.programs[rank][index]
        if work.kind in ("copy", "compute") and (rank, index) not in self.half_done:
            self.half_done.add((rank, index))
            self._use(rank, work, 1)
            return
        if work.kind in ("copy", "compute"):
            self._use(rank, work, -1)
        if work.kind == "write":
            assert work.counter is not None and self.counters[work.counter] < work.value
            self.counters[work.counter] = work.value
        self.done[rank][index] = True
        for queue in self.queues[rank]:
            if queue and queue[0] == index:
                queue.pop(0)

    def _use(self, rank: int, work: Work, change: int) -> None:
        """Begin (1) or end (-1) to read and write what a copy or a round reads and writes."""
        if work.kind == "copy":
            source = ("staging", rank, work.staging) if work.lane == HIDDEN else None
            target: tuple[object, ...] | None = ("inbox", work.target, work.lane, work.slot)
        else:
            source = ("inbox", rank, HIDDEN, work.slot) if work.slot >= 0 else None
            target = ("staging", rank, work.staging) if work.staging >= 0 else None
        if source is not None:
            assert self.users[source] >= 0, f"rank {rank} reads {source} while it is written"
            self.users[source] += change
        if target is not None:
            assert self.users[target] == (0 if change > 0 else -1), f"rank {rank} writes {target} while it is used"
            self.users[target] -= change
        if change > 0 and work.kind == "compute" and work.slot >= 0:
            found = self.inbox[rank, HIDDEN, work.slot]
            assert found == work.number + 1, f"rank {rank} reads round {found} for round {work.number + 1}"
        if change > 0 and work.kind == "copy" and work.lane == HIDDEN and (rank, work.staging) in self.staged:
            found = self.staged[rank, work.staging]
            assert found == work.number, f"rank {rank} sends round {found} for round {work.number}"
        if change < 0 and work.kind == "copy":
            self.inbox[work.target, work.lane, work.slot] = work.number
        if change < 0 and work.kind == "compute" and work.staging >= 0:
            self.staged[rank, work.staging] = work.number + 1


def explore(seeds: Sequence[int], schedules_each: int) -> int:
    """Draw a case for each seed and schedules for each case, half of them in order of queueing -> how many ran."""
    count = 0
    for seed in seeds:
        case = Case.draw(seed)
        for host_waits in (False, True):
            programs = case.programs(host_waits=host_waits)
            for index in range(schedules_each):
                Schedule(programs, seed=seed * 1000 + index, serial=index % 2 == 1).run()
                count += 1
    return count


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(f"{explore(range(wanted // 10), 5)} schedules, all to their end and right")

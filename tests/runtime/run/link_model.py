"""The real pipeline and its peer links over a fake memory that records every command, run in random schedules:
`python -m tests.runtime.run.link_model 10000`.

What a rank queues does not depend on data, so it is recorded once for each case.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest import mock

import torch

from profiler.comm.links import peer_link
from profiler.comm.links.boundary import RankLinks
from profiler.comm.links.group import Groups, PeerPair, RankGroup
from profiler.comm.links.mesh import Mesh, Transport
from profiler.comm.links.peer_link import HIDDEN, PeerInbound, PeerOutbound, PeerReturn
from profiler.comm.links.peer_memory import Queue
from profiler.comm.ranks.mark import Progress
from profiler.sequence.kind import SequenceCut
from runtime.job.job import RunJob
from runtime.job.place import Place, mesh_of
from runtime.run import pipeline as pipeline_module
from runtime.run.pipeline import Pipeline
from runtime.stage.share import RoundShare
from tests.runtime.run.link_schedule import Schedule
from tests.runtime.run.link_work import Label, Work
from tuner.plan.plan import Chunk, Parallel, Request, Round
from tuner.plan.stage_order import StageOrder
from tuner.plan.task_order import MESSAGES

WIDTH = 1
CPU = torch.device("cpu")
PUSHED, FREED = "pushed", "freed"


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

    place: Place
    slots: int
    max_tokens: int
    program: list[Work] = field(default_factory=list)
    num_queues: int = 1
    runs: Counter[int] = field(default_factory=Counter)  # of each group
    boxes: list[torch.Tensor] = field(default_factory=list)
    stagings: dict[int, torch.Tensor] = field(default_factory=dict)  # by target
    group: int = -1  # that runs
    read: tuple[int, int] = (-1, -1)  # lane and slot that it read
    written: tuple[int, int] | None = None  # target and slot that it wrote
    done: Label | None = None  # the task that ran last
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    origin_s: float = 0.0
    syncs: random.Random | None = None

    def __post_init__(self) -> None:
        hidden = [torch.zeros(self.slots, self.max_tokens, WIDTH) for _ in HIDDEN]
        self.boxes = [hidden[0], torch.zeros(self.slots, 8, 1).long(), hidden[1]]

    @property
    def rank(self) -> int:
        return self.place.stage

    def staging_of(self, target: int) -> torch.Tensor:
        self.stagings[target] = torch.zeros(self.slots, self.max_tokens, WIDTH)
        return self.stagings[target]

    # Memory
    def inbox(self, lane: int) -> torch.Tensor:
        return self.boxes[lane]

    def current_queue(self) -> Queue:
        return FakeQueue(self, 0)

    def new_queue(self) -> Queue:
        self.num_queues += 1
        return FakeQueue(self, self.num_queues - 1)

    def copy(self, queue: Queue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        staging = (receiver, self._slot_of(self.stagings[receiver], source)) if lane in HIDDEN else None
        self._add(queue, "copy", target=receiver, lane=lane, slot=slot, staging=staging, label=self.done)

    def pushed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        self._add(queue, "write", counter=(PUSHED, receiver, lane, self.rank), value=count)

    def wait_pushed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        self._add(queue, "wait", counter=(PUSHED, self.rank, lane, sender), value=count)

    def freed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        self._add(queue, "write", counter=(FREED, sender, lane, self.rank), value=count)

    def wait_freed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        self._add(queue, "wait", counter=(FREED, self.rank, lane, receiver), value=count)

    # Clock: a task is one command
    def start(self) -> None:
        self.read, self.written = (-1, -1), None

    def finish(self) -> None:
        waits = self.syncs is not None and self.syncs.random() < 0.2
        self.done = self.group, self.runs[self.group]
        self.runs[self.group] += 1
        lane, slot = self.read
        self._add(FakeQueue(self, 0), "compute", lane=lane, slot=slot, staging=self.written, label=self.done)
        self.program[-1].waits_for_host = waits

    # Stage
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ids.shape[0], WIDTH)

    def forward(self, _share: object, hidden: torch.Tensor, layers: slice) -> torch.Tensor:
        self.group = self.place.groups[layers.start]  # of one layer each
        found = [(lane, self._slot_of(self.boxes[lane], hidden)) for lane in HIDDEN]
        self.read = next((place for place in found if place[1] >= 0), (-1, -1))
        return hidden.clone()

    def forward_step(self, hidden: torch.Tensor, layers: slice) -> torch.Tensor:
        return self.forward((), hidden, layers)

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
    """Notes where a task lays what it sends."""

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        memory = cast(FakeRank, self.memory)
        memory.written = self.target, index % memory.slots
        return super().buffer(index, num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: stages, their groups, slots, window, tokens of each round, passes over them, and steps of decode after."""

    pp_size: int
    virtual_stages: int
    stage_order: StageOrder
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
        virtual_stages = draw.choice([1, 1, 2, 2, 3])
        pp_size = draw.randint(2, 8 if virtual_stages == 1 else 5)
        return cls(
            pp_size=pp_size,
            virtual_stages=virtual_stages,
            stage_order=draw.choice(list(StageOrder)),
            slots=draw.choice([1, 2, 2, 3] if virtual_stages == 1 else [MESSAGES, MESSAGES, MESSAGES + 1]),
            window=draw.choice([None, *range(1, pp_size + 2)]),
            round_tokens=tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 7 if virtual_stages == 1 else 14))),
            num_passes=draw.randint(1, 3),
            decode_steps=draw.randint(0, 3),
            seed=seed,
        )

    def programs(self, *, host_waits: bool) -> list[list[Work]]:
        """What the pipeline of each rank queues."""
        job = self._job()
        syncs = random.Random(self.seed) if host_waits else None
        places = [Place.of(rank, job.parallel) for rank in range(self.pp_size)]
        ranks = [FakeRank(place, self.slots, 8, syncs=syncs) for place in places]
        with TemporaryDirectory() as folder, mock.patch.object(peer_link, "SLOTS", self.slots):
            for rank in ranks:
                links = self._links(rank)
                with mock.patch.object(pipeline_module, "make_links", lambda *_: links):  # noqa: B023 - called at once
                    made: Any = rank
                    progress = Progress(Path(folder) / f"progress-{rank.rank}", pid=1)
                    pipeline = Pipeline(job, rank.place, self._groups(rank.rank), made, made, progress)
                pipeline.warm_up()
                for _ in range(self.num_passes):
                    pipeline.prefill()
                if self.decode_steps:
                    pipeline.decode(self.decode_steps)
        return [rank.program for rank in ranks]

    def _job(self) -> RunJob:
        total = sum(self.round_tokens)
        starts = [sum(self.round_tokens[:index]) for index in range(len(self.round_tokens))]
        shape: Any = mock.Mock(hidden_size=WIDTH)
        kernels: Any = None
        return RunJob(
            shape=shape,
            parallel=Parallel(
                tp_size=1,
                pp_size=self.pp_size,
                layer_partition=(1,) * (self.pp_size * self.virtual_stages),
                virtual_stages=self.virtual_stages,
                stage_order=self.stage_order,
            ),
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

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self._job().parallel)

    def _links(self, rank: FakeRank) -> RankLinks:
        mesh, me = self.mesh, rank.rank

        def lane(source: int, target: int) -> int:
            return HIDDEN[mesh.sources(target).index(source)]

        to, ends = [target for source, target in mesh.hand_offs() if source == me], (0, mesh.last_stage)
        return RankLinks(
            inbound={source: PeerInbound(rank, source, lane(source, me)) for source in mesh.sources(me)},
            outbound={target: NotedOutbound(rank, target, rank.staging_of(target), lane(me, target)) for target in to},
            back=PeerReturn(rank, mesh.last_stage - me) if me in ends and mesh.last_stage else None,
        )

    def _groups(self, rank: int) -> Groups:
        mesh = self.mesh

        def pair(peer: int) -> PeerPair:
            return PeerPair(peer=peer, transport=Transport.PEER_MEMORY, group=None)

        everyone: Any = None
        has_back = rank in (0, mesh.last_stage) and mesh.last_stage > 0
        return Groups(
            tensor=RankGroup(),
            sequence=RankGroup(),
            sequence_ranks=(rank,),
            inbound={source: pair(source) for source in mesh.sources(rank)},
            outbound={target: pair(target) for source, target in mesh.hand_offs() if source == rank},
            hand_offs=mesh.hand_offs(),
            back=pair(mesh.last_stage - rank) if has_back else None,
            everyone=everyone,
            sharing=None,
        )


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

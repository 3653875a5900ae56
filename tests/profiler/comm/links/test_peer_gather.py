"""Gathers over shared memory: right and without end on queues of random speed, and wrong without either wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from profiler.comm.links import peer_gather
from profiler.comm.links.group import RankGroup
from profiler.comm.links.peer_gather import SLOTS, PeerGatherGroup, gather_lanes

LIMIT_S = 20.0
NUMBERS = 6
LAYERS = 3  # of a round: its last slot is the next round's first
Work = Callable[[], object]


class FakeQueue:
    """A card's queue: a thread that does its work in order, each piece after a random while."""

    def __init__(self, seed: int) -> None:
        self.works: SimpleQueue[Work | None] = SimpleQueue()
        self.draw = random.Random(seed)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def add(self, work: Work) -> None:
        self.works.put(work)

    def mark(self) -> object:
        moment = threading.Event()
        self.add(moment.set)
        return moment

    def wait_for(self, moment: object) -> None:
        assert isinstance(moment, threading.Event)
        self.add(lambda: until(moment.is_set))

    def _run(self) -> None:
        while (work := self.works.get()) is not None:
            if self.draw.random() < 0.3:
                time.sleep(self.draw.random() * 2e-3)
            work()


def until(met: Callable[[], bool]) -> None:
    """Wait, but not for ever."""
    give_up = time.monotonic() + LIMIT_S
    while not met():
        if time.monotonic() > give_up:
            raise TimeoutError
        time.sleep(1e-5)


@dataclass
class Card:
    """A rank's buffer and its flags, by channel and sender."""

    boxes: torch.Tensor  # [lanes, slots * numbers]
    flags: dict[tuple[int, int], threading.Event] = field(default_factory=dict)


class FakeMemory:
    """What PeerGatherGroup asks of `PeerMemory`, over threads."""

    first_channel = 0

    def __init__(self, rank: int, cards: list[Card], seed: int) -> None:
        self.rank, self.cards, self.seed = rank, cards, seed
        self.lanes = gather_lanes(len(cards), NUMBERS, torch.float32)
        self.current = FakeQueue(seed)

    def inbox(self, lane: int) -> torch.Tensor:
        return self.cards[self.rank].boxes[lane].view(SLOTS, 1, NUMBERS)

    def inboxes(self, first: int, count: int) -> torch.Tensor:
        return self.cards[self.rank].boxes[first : first + count]

    def new_queue(self) -> FakeQueue:
        return FakeQueue(self.seed + 1)

    def current_queue(self) -> FakeQueue:
        return self.current

    def copy_part(self, queue: FakeQueue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        target = self.cards[receiver].boxes[lane].view(SLOTS, 1, NUMBERS)[slot, :, : source.shape[1]]
        queue.add(lambda: target.copy_(source))

    def signal(self, queue: FakeQueue, receiver: int, channel: int) -> None:
        flag = self.cards[receiver].flags[channel, self.rank]

        def put() -> None:
            until(lambda: not flag.is_set())
            flag.set()

        queue.add(put)

    def await_signal(self, queue: FakeQueue, sender: int, channel: int) -> None:
        flag = self.cards[self.rank].flags[channel, sender]

        def take() -> None:
            until(flag.is_set)
            flag.clear()

        queue.add(take)


def _keep(kept: list[torch.Tensor], gathered: torch.Tensor) -> None:
    kept.append(gathered.clone())


def run(size: int, gathers: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What each rank reads of each gather, and what it should."""
    cards = [Card(torch.zeros(size, SLOTS * NUMBERS)) for _ in range(size)]
    for card in cards:
        card.flags = {(channel, sender): threading.Event() for channel in range(2 * SLOTS) for sender in range(size)}
    memories = [FakeMemory(rank, cards, seed * 100 + 10 * rank) for rank in range(size)]
    groups = []
    for rank, memory in enumerate(memories):
        made: Any = memory
        groups.append(PeerGatherGroup(RankGroup(None, size, rank), range(size), made, 0))
    read: list[list[torch.Tensor]] = [[] for _ in range(size)]
    like = torch.zeros(())
    for number in range(gathers):
        for rank, (group, memory) in enumerate(zip(groups, memories, strict=True)):
            if number % LAYERS == 0:
                group._count = 0  # a recorded round begins with the slot that it was recorded with
            part = group.new_part(like, (2, NUMBERS // 2))
            value = float(100 * number + rank)
            memory.current.add(partial(part.fill_, value))
            gathered = group.begin_gather(part)()
            kept = read[rank]
            memory.current.add(partial(_keep, kept, gathered))
            group.release()
    ends = [memory.current.mark() for memory in memories]
    for end in ends:
        assert isinstance(end, threading.Event)
        assert end.wait(LIMIT_S), "a queue waits for ever"
    for rank in range(size):
        for number, found in enumerate(read[rank]):
            wanted = torch.tensor([100.0 * number + sender for sender in range(size)])
            yield found, wanted.view(size, 1, 1).expand(size, 2, NUMBERS // 2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_every_rank_reads_every_part(size: int, seed: int) -> None:
    pairs = list(run(size, 30, seed))
    assert len(pairs) == 30 * size
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("step", ["_freed", "_filled"])
def test_without_a_wait_parts_are_mixed_up(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await_all = PeerGatherGroup._await
    say_all = PeerGatherGroup._say

    def is_kept(group: PeerGatherGroup, channel: int) -> bool:
        return channel not in [getattr(group, step)(slot) for slot in range(SLOTS)]

    def leave_out(call: Callable[[PeerGatherGroup, int], None]) -> Callable[[PeerGatherGroup, int], None]:
        return lambda group, channel: call(group, channel) if is_kept(group, channel) else None

    monkeypatch.setattr(PeerGatherGroup, "_await", leave_out(await_all))
    monkeypatch.setattr(PeerGatherGroup, "_say", leave_out(say_all))
    if step == "_filled":  # said on the copies' queue, flag by flag
        monkeypatch.setattr(FakeMemory, "signal", lambda *_: None)
        monkeypatch.setattr(PeerGatherGroup, "_await", lambda *_: None)
    wrong = sum(not torch.equal(*pair) for seed in range(6) for pair in run(3, 30, seed))
    assert wrong > 0


def test_a_tensor_that_is_no_part_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = FakeMemory(0, [Card(torch.zeros(1, SLOTS * NUMBERS))], 0)
    group = PeerGatherGroup(RankGroup(None, 1, 0), [0], memory, 0)
    asked: list[torch.Tensor] = []

    def usual(_self: object, tensor: torch.Tensor, *, into: torch.Tensor | None = None) -> None:
        asked.append(tensor)

    monkeypatch.setattr(peer_gather.RankGroup, "begin_gather", usual)
    tensor = torch.ones(3)
    group.begin_gather(tensor)
    assert asked == [tensor]

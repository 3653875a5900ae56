"""The links over shared memory end for any number of stages, windows, slots, rounds, passes and steps of decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise

import pytest
from torch.distributed import DistStoreError, HashStore, PrefixStore

from profiler.comm.links.peer_link import PeerOutbound
from tests.runtime.run.link_model import FakeRank, explore


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_every_schedule_ends_and_each_round_reads_its_own(first: int) -> None:
    assert explore(range(first, first + 10), 6) == 120


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (FakeRank, "wait_freed"),  # a slot is filled while it is read
        (FakeRank, "wait_pushed"),  # a round begins before its hidden states are there
        (PeerOutbound, "reserve"),  # a round is laid where the one before is still being copied from
    ],
)
def test_without_a_wait_some_schedule_goes_wrong(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, lambda *_: None)
    with pytest.raises((AssertionError, KeyError)):
        explore(range(30), 6)


def test_without_a_message_nothing_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRank, "freed", lambda *_: None)
    with pytest.raises(AssertionError, match="nothing can go on"):
        explore(range(30), 6)


class Rendezvous:
    """torch's way to meet for symmetric memory: keys are numbered by one count a process, whatever the group."""

    def __init__(self, world_size: int) -> None:
        self.store = HashStore()
        self.store.set_timeout(timedelta(seconds=1.5))
        self.counts = [0] * world_size

    def meet(self, rank: int, group: Sequence[int]) -> None:
        store = PrefixStore("-".join(map(str, group)), self.store)
        number, self.counts[rank] = self.counts[rank], self.counts[rank] + 1
        store.set(f"{number}/{rank}", "here")
        store.wait([f"{number}/{other}" for other in group])

    def all_meet(self, order: Callable[[int], Sequence[Sequence[int]]]) -> list[int]:
        """Each rank meets its groups in its order -> the ranks that waited in vain."""

        def run(rank: int) -> bool:
            try:
                for group in order(rank):
                    self.meet(rank, group)
            except DistStoreError:
                return False
            return True

        with ThreadPoolExecutor(len(self.counts)) as ranks:
            return [rank for rank, met in enumerate(ranks.map(run, range(len(self.counts)))) if not met]


def pairs_of(rank: int, world_size: int) -> list[tuple[int, int]]:
    return [pair for pair in pairwise(range(world_size)) if rank in pair]


@pytest.mark.parametrize(("world_size", "hangs"), [(2, False), (3, True), (4, True)])
def test_a_rendezvous_for_each_boundary_hangs_with_three_stages(world_size: int, hangs: bool) -> None:
    assert bool(Rendezvous(world_size).all_meet(lambda rank: pairs_of(rank, world_size))) is hangs


def test_boundaries_in_turns_hang_the_next_plan_instead() -> None:
    rendezvous = Rendezvous(3)
    in_turns = {0: [(0, 1)], 1: [(0, 1), (1, 2)], 2: [(1, 2)]}
    rendezvous.counts[2] = 1  # as if the ends had been made to agree once
    assert rendezvous.all_meet(in_turns.__getitem__) == []
    assert rendezvous.all_meet(in_turns.__getitem__) != []


@pytest.mark.parametrize("world_size", range(2, 9))
def test_one_rendezvous_of_all_ranks_a_plan_never_hangs(world_size: int) -> None:
    rendezvous = Rendezvous(world_size)
    for _ in range(3):
        assert rendezvous.all_meet(lambda _rank: [tuple(range(world_size))]) == []

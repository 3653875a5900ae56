"""The links over shared memory end for any number of stages, windows, slots, rounds, passes and steps of decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest
from torch.distributed import DistStoreError, HashStore, PrefixStore

from profiler.comm.links.buffers import POSTED_AHEAD, STAGED
from profiler.comm.links.peer_link import SLOTS, PeerOutbound
from runtime.run.task import tasks_of
from tests.runtime.run.link_model import Case, FakeRank, explore
from tests.runtime.run.link_schedule import Schedule
from tuner.plan.plan import Parallel
from tuner.plan.stage_order import StageOrder, stages_of_groups
from tuner.plan.task_order import MESSAGES, TaskOrder


@pytest.mark.parametrize("first", range(0, 30, 10))
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


def test_an_order_that_no_run_had_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rounds in one pass before any in the next, as a stage could that had room for all of them."""

    def all_at_once(
        num_rounds: int, pp_size: int, virtual_stages: int, order: StageOrder, window: int | None = None
    ) -> TaskOrder:
        tasks = [(i, group) for group in range(pp_size * virtual_stages) for i in range(num_rounds)]
        rounds, groups = np.array(tasks, dtype=np.int64).reshape(-1, 2).T
        return TaskOrder(rounds, groups, stages_of_groups(pp_size, virtual_stages, order))

    monkeypatch.setattr("runtime.run.task.task_order", all_at_once)
    case = Case(
        pp_size=2, virtual_stages=2, stage_order=StageOrder.LOOP, slots=2, window=None, round_tokens=(1,) * 12,
        num_passes=1, decode_steps=0, seed=0,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="nothing can go on"):
        Schedule(case.programs(host_waits=False), seed=0, serial=False).run()


def test_no_transport_holds_fewer_messages_than_the_order_counts_on() -> None:
    assert min(SLOTS, POSTED_AHEAD, STAGED) >= MESSAGES


def test_two_senders_in_one_lane_mix_up_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.runtime.run.link_model.HIDDEN", (0, 0))
    case = Case(
        pp_size=3, virtual_stages=2, stage_order=StageOrder.V, slots=2, window=None, round_tokens=(1,) * 6,
        num_passes=1, decode_steps=0, seed=0,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        for seed in range(10):
            Schedule(case.programs(host_waits=False), seed=seed, serial=False).run()


@pytest.mark.parametrize("stage_order", StageOrder)
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
def test_no_receive_is_posted_before_what_its_sender_waits_for_is_queued(
    virtual_stages: int, stage_order: StageOrder
) -> None:
    """A task's senders, and all that these wait for on this rank, were queued before the receive; and it is posted in
    time."""
    for pp_size, num_rounds, window in ((2, 1, None), (2, 7, 2), (3, 9, None), (4, 6, 3)):
        parallel = Parallel(
            tp_size=1, pp_size=pp_size, virtual_stages=virtual_stages, stage_order=stage_order,
            layer_partition=(1,) * (pp_size * virtual_stages),
        )  # fmt: skip
        for stage in range(pp_size):
            mine = tasks_of(parallel, stage, num_rounds, window)
            for source, announced in mine.announced.items():
                reads = [place for place, task in enumerate(mine.tasks) if task.source == source]
                assert [mine.tasks[place].received for place in reads] == list(range(len(announced)))
                for place, one in zip(reads, announced, strict=True):
                    task = mine.tasks[place]
                    assert one.round_index == task.round_index and one.after <= place
                    own = [at for at, other in enumerate(mine.tasks)
                           if other.round_index == task.round_index and other.group < task.group]  # fmt: skip
                    assert not own or own[-1] < one.after


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

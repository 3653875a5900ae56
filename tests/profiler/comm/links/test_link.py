"""Hidden states over a boundary between two real processes: announced, sent, received in order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from profiler.comm.links.link import STAGED, CollectiveInbound, CollectiveOutbound
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext

HIDDEN = 4
SEQUENCES = ((5, 1, 7, 3, 7), (2,), (7, 7))  # tokens of the rounds of three passes


def carry(context: RankContext, sequences: Sequence[Sequence[int]], staged: bool) -> list[list[float]]:
    """Rank 0 sends rounds whose values tell pass and round; rank 1 returns what it found in each."""
    group = dist.new_group([0, 1])
    most = max(max(tokens) for tokens in sequences)
    if context.rank == 0:
        staging = torch.full((STAGED, most, HIDDEN), -1.0) if staged else None
        outbound = CollectiveOutbound(group, 1, staging=staging)
        for number, tokens in enumerate(sequences):
            outbound.begin()
            for index, count in enumerate(tokens):
                hidden = torch.full((count, HIDDEN), float(100 * number + index))
                place = outbound.buffer(index, count)
                assert (place is None) is not staged
                outbound.reserve()
                outbound.send(hidden if place is None else place.copy_(hidden))
        outbound.drain()
        return []
    inbound = CollectiveInbound(
        group, 0, max_tokens=most, hidden_size=HIDDEN, device=context.device, dtype=torch.float32
    )
    found = []
    for tokens in sequences:
        inbound.expect(tokens)
        values = []
        for index, count in enumerate(tokens):
            inbound.receive()
            values.append(inbound.buffer(index, count).unique().tolist())
            inbound.release()
        found.append([value for (value,) in values])
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("staged", [False, True], ids=["anywhere", "staged"])
def test_rounds_arrive_whole_and_in_order(staged: bool) -> None:
    _, found = run_ranks(carry, SEQUENCES, staged, world_size=2, device_type="cpu", num_threads=1)
    assert found == [[100.0 * number + index for index in range(len(t))] for number, t in enumerate(SEQUENCES)]


def test_rounds_are_not_announced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Posted:
        def wait(self) -> None: ...

    monkeypatch.setattr(dist, "irecv", lambda *_args, **_options: Posted())
    group: dist.ProcessGroup = object()  # type: ignore[assignment]  # never looked at
    inbound = CollectiveInbound(
        group, 0, max_tokens=3, hidden_size=HIDDEN, device=torch.device("cpu"), dtype=torch.float32
    )
    inbound.expect([3, 2])
    with pytest.raises(RuntimeError, match="have not all been received"):
        inbound.expect([1])


def test_a_receive_is_posted_once_its_sender_waits_for_nothing_more_of_this_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posted: list[int] = []

    class Posted:
        def wait(self) -> None: ...

    def irecv(buffer: torch.Tensor, *_args: object, **_options: object) -> Posted:
        posted.append(buffer.shape[0])
        return Posted()

    monkeypatch.setattr(dist, "irecv", irecv)
    group: dist.ProcessGroup = object()  # type: ignore[assignment]  # never looked at
    inbound = CollectiveInbound(
        group, 0, max_tokens=9, hidden_size=HIDDEN, device=torch.device("cpu"), dtype=torch.float32
    )
    inbound.expect([1, 2, 3, 4], [0, 1, 1, 3])
    assert posted == [1]
    inbound.queued(1)
    assert posted == [1, 2]  # two buffers
    inbound.receive()
    inbound.release()
    assert posted == [1, 2, 3]
    inbound.queued(2)
    inbound.receive()
    inbound.release()
    assert posted == [1, 2, 3]  # the fourth's sender waits for a third task
    inbound.queued(3)
    assert posted == [1, 2, 3, 4]

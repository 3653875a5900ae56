"""The order in which peer links fill, push, read and free their slots; the card's streams are stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from profiler.comm.peer_link import PeerInbound, PeerOutbound
from profiler.peer import SLOTS


class FakeRing:
    """Notes what is asked of it; tells whether an order would overwrite what is still needed."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def slot(self, slot: int, rows: int) -> torch.Tensor:
        return torch.zeros(rows, 1) + slot

    def push(self, slot: int, _rows: int) -> None:
        self.log.append(("push", slot))

    def wait_pushed(self, slot: int) -> None:
        self.log.append(("wait pushed", slot))

    def acknowledge(self, slot: int) -> None:
        self.log.append(("acknowledge", slot))

    def wait_acknowledged(self, slot: int) -> None:
        self.log.append(("wait acknowledged", slot))


class FakeStream:
    """Notes what waits for it."""

    def __init__(self, ring: FakeRing) -> None:
        self.ring = ring

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, event: FakeEvent) -> None:
        self.ring.log.append(("compute waits for copy", event.slot))


class FakeEvent:
    slot = -1

    def record(self) -> None: ...


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> FakeRing:
    made = FakeRing()

    @contextmanager
    def stream(_stream: object) -> Iterator[None]:
        yield

    def event() -> FakeEvent:
        new = FakeEvent()
        new.slot = next(slot for name, slot in reversed(made.log) if name == "push")
        return new

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args, **_options: FakeStream(made))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: FakeStream(made))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", event)
    return made


def send(outbound: PeerOutbound, num_rounds: int) -> None:
    outbound.begin()
    for index in range(num_rounds):
        outbound.reserve()
        place = outbound.buffer(index, 3)
        assert place[0, 0] == index % SLOTS  # where a recorded round lays its hidden states
        outbound.send(place)


def check(log: list[tuple[str, int]]) -> None:
    """No slot is pushed while it is unread, and each push is acknowledged once."""
    unread: set[int] = set()
    for name, slot in log:
        if name == "push":
            assert slot not in unread
            unread.add(slot)
        elif name == "wait acknowledged":
            unread.remove(slot)


@pytest.mark.parametrize("passes", [(1,), (2, 2), (5, 5, 1, 1), (7, 3), (0, 4)])
def test_nothing_unread_is_overwritten_over_passes_of_any_length(passes: tuple[int, ...], ring: FakeRing) -> None:
    made: Any = ring
    outbound = PeerOutbound(made, torch.device("cpu"))
    for num_rounds in passes:
        send(outbound, num_rounds)
    outbound.drain()
    check(ring.log)
    pushes = [slot for name, slot in ring.log if name == "push"]
    assert pushes == [index % SLOTS for num_rounds in passes for index in range(num_rounds)]
    assert sum(name == "wait acknowledged" for name, _ in ring.log) == len(pushes)


def test_a_slot_is_written_again_only_after_its_copy(ring: FakeRing) -> None:
    made: Any = ring
    send(PeerOutbound(made, torch.device("cpu")), 5)
    order = [entry for entry in ring.log if entry[0] in ("push", "compute waits for copy")]
    for index in range(SLOTS, 5):
        pushed = [at for at, (name, _) in enumerate(order) if name == "push"]
        waited = [at for at, (name, slot) in enumerate(order) if name != "push" and slot == index % SLOTS]
        assert any(pushed[index - SLOTS] < at < pushed[index] for at in waited)


def test_each_round_is_waited_for_read_and_acknowledged(ring: FakeRing) -> None:
    made: Any = ring
    inbound = PeerInbound(made)
    for num_rounds in (3, 2):
        inbound.expect([4] * num_rounds)
        for index in range(num_rounds):
            inbound.receive()
            assert inbound.buffer(index, 4)[0, 0] == index % SLOTS
            inbound.release()
    slots = [index % SLOTS for num_rounds in (3, 2) for index in range(num_rounds)]
    assert ring.log == [(name, slot) for slot in slots for name in ("wait pushed", "acknowledge")]

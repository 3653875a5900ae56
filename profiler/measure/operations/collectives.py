"""Timed communication: collectives over groups of ranks, messages between two, and a round's fixed overhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from profiler.comm.links.group import HostGroup
from profiler.comm.links.peer_memory import Lane, PeerMemory, Queue
from profiler.measure.operations.operators import Operators
from profiler.measure.timing import Prepared
from profiler.model.precision import Format
from profiler.points.point import Op, Point
from profiler.points.rank_groups import RankGroups

# Renamed in torch 2.13, which warns at the older names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The group of ranks this rank is in."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's place in it."""
        return self.ranks.index(dist.get_rank())

    @property
    def partner(self) -> int:
        """The other rank of a pair."""
        return self.ranks[1 - self.index]


def collective_groups(forms: Sequence[RankGroups], world_size: int) -> dict[RankGroups, Neighbours]:
    """Groups of each form; every rank must call it with the same forms. Ranks left over have no group of that form."""
    found = {}
    for form in forms:
        for ranks in form.of(world_size):
            # A communicator of its own for each: point-to-point traffic that shares one is serialised.
            group = dist.new_group(list(ranks))
            if dist.get_rank() in ranks:
                found[form] = Neighbours(group, ranks)
    return found


def prepare_collective(point: Point, neighbours: Neighbours, device: torch.device, sent: Format) -> Prepared:
    """The work of a collective point.

    `bytes` is the whole message: what is reduced, the gathered result, what is scattered, what one rank sends to all.
    """
    group, count = neighbours.group, sent.num_elements(point.shape["bytes"])
    whole = torch.ones(count, device=device, dtype=sent.torch_dtype)
    part = torch.ones(count // neighbours.size, device=device, dtype=sent.torch_dtype)
    call: Callable[[], object]
    match point.op:
        case Op.ALL_REDUCE:
            zeros = torch.zeros_like(whole)  # repeated sums would overflow
            call = partial(dist.all_reduce, zeros, group=group)
        case Op.ALL_GATHER:
            call = partial(_ALL_GATHER, whole, part, group=group)
        case Op.REDUCE_SCATTER:
            call = partial(_REDUCE_SCATTER, part, whole, group=group)
        case Op.ALL_TO_ALL:
            received = torch.empty_like(whole)
            call = partial(dist.all_to_all_single, received, whole, group=group)
        case _:
            raise ValueError(f"{point.op} is no collective")
    # On cards nothing but the usual load, which runs between the samples, makes one rank later than another.
    return Prepared(run=lambda _call: call(), waits=True, in_step=device.type == "cuda")


class PeerMessages:
    """Messages between the two ranks of a pair through memory that they share, as in a pipeline."""

    def __init__(self, memory: PeerMemory, partner: int, staging: torch.Tensor) -> None:
        self.memory, self.partner, self.staging = memory, partner, staging
        self._sent = self._received = 0

    @classmethod
    def of(
        cls, group: HostGroup, partner: int, *, count: int, device: torch.device, dtype: torch.dtype
    ) -> PeerMessages:
        """Make them for messages of at most `count` elements; all ranks of the host call this together."""
        lane = Lane(slots=1, rows=count, width=1, dtype=dtype)
        memory = PeerMemory(group.group, group.ranks, [lane], device)
        return cls(memory, partner, torch.ones(count, 1, device=device, dtype=dtype))

    def push(self, count: int) -> None:
        """Send `count` elements; the partner has read the message before, since it answered."""
        queue = self.memory.current_queue()
        self._sent += 1
        self.memory.copy(queue, self.partner, 0, 0, self.staging[:count])
        self.memory.pushed(queue, self.partner, 0, self._sent)

    def take(self, queue: Queue | None = None) -> None:
        """Wait for the partner's next message, on the current queue or another."""
        self._received += 1
        self.memory.wait_pushed(queue or self.memory.current_queue(), self.partner, 0, self._received)


def prepare_message(
    point: Point, neighbours: Neighbours, messages: PeerMessages | None, device: torch.device, sent: Format
) -> Prepared:
    """A message goes from the pair's first rank to its second and back, through shared memory where there is some."""
    count = sent.num_elements(point.shape["bytes"])
    if messages is None:
        return _there_and_back(torch.ones(count, device=device, dtype=sent.torch_dtype), neighbours)
    push = partial(messages.push, count)
    order = (messages.take, push) if neighbours.index else (push, messages.take)

    def run(_call: int) -> None:
        for step in order:
            step()

    return Prepared(run=run, num_units=2, waits=True, recordable=False)


def prepare_round_overhead(point: Point, operators: Operators, neighbours: Neighbours | None) -> Prepared:
    """What a round costs a stage besides its layers: making it ready, and posting its receive or its send.

    As in a pipeline a pair's first rank sends and its second receives. Nothing is waited for while the clock runs: the
    link's own time is that of `send_recv`, and receives are posted rounds ahead. On CUDA the host posts beside the
    card's work.
    """
    chunks, tokens = point.shape["chunks"], point.shape["tokens"]
    length = tokens // chunks
    layout = [(index * length, 0, length) for index in range(chunks)]
    if neighbours is None or operators.workspace.device.type == "cuda":
        return Prepared(run=lambda _call: operators.round_inputs(layout))
    message = operators.workspace.random(tokens, operators.shape.hidden_size)
    group, partner = neighbours.group, neighbours.partner
    post = dist.irecv if neighbours.index else dist.isend
    pending: list[dist.Work] = []

    def run(_call: int) -> None:
        work = post(message, partner, group=group)
        assert work is not None
        pending.append(work)
        operators.round_inputs(layout)

    def finish() -> None:
        while pending:
            pending.pop(0).wait()

    return Prepared(run=run, finish=finish)


def _there_and_back(message: torch.Tensor, neighbours: Neighbours) -> Prepared:
    """A message goes from the pair's first rank to its second and back: two times one way."""
    partner, group = neighbours.partner, neighbours.group

    def first(_call: int) -> None:
        dist.send(message, partner, group=group)
        dist.recv(message, partner, group=group)

    def second(_call: int) -> None:
        dist.recv(message, partner, group=group)
        dist.send(message, partner, group=group)

    return Prepared(run=second if neighbours.index else first, num_units=2, waits=True, recordable=False)

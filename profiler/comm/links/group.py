"""The process groups of a rank: tensor- and sequence-parallel groups, and a pair for each direction between stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from profiler.comm.links.mesh import Host, Hosts, Mesh, Transport, agree
from profiler.hardware.device import nccl_link

# Torch 2.13 gave them new names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankGroup:
    """A tensor- or sequence-parallel group of ranks; with one rank, its collectives do nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None, size: int = 1, rank: int = 0) -> None:
        self.group, self.size, self.rank = group, size, rank  # this rank's index in the group

    def reduce(self, bias: torch.Tensor | None) -> Reduction:
        """What sums partial results over the ranks and adds a row-parallel bias [N] once."""
        return Reduction(self, bias)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def sum_scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum: [size * P, ...] -> [P, ...]."""
        if self.group is None:
            return partial
        mine = partial.new_empty((partial.shape[0] // self.size, *partial.shape[1:]))
        _reduce_scatter(mine.view(-1), partial.reshape(-1), group=self.group)
        return mine

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack the tensors of all ranks: [...] -> [size, ...]."""
        return self.begin_gather(tensor)()

    def new_part(self, like: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """A buffer for this rank's part of the next gather, of `like`'s type; empty."""
        return like.new_empty(size)

    def release(self) -> None:
        """The result of the last gather has been read, so its buffers may be reused."""

    def begin_gather(self, tensor: torch.Tensor, *, into: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """Start a gather of all ranks' tensors; returns a function that waits and returns [size, ...].

        into: room for as many numbers, if the result is to lie there.
        """
        size = (self.size, *tensor.shape)
        stacked = tensor.new_empty(size) if into is None else into.view(size)
        sent = tensor.reshape(-1)
        return _waiting(_all_gather(stacked.view(-1), sent, group=self.group, async_op=True), stacked, sent)

    def exchange(self, parts: Sequence[torch.Tensor], received: Sequence[int]) -> list[torch.Tensor]:
        """Send part i to rank i; received: how many numbers each rank sends here -> flat tensors, one a rank."""
        sent = torch.cat([part.reshape(-1) for part in parts])
        arrived = sent.new_empty(sum(received))
        dist.all_to_all_single(arrived, sent, list(received), [part.numel() for part in parts], group=self.group)
        return list(arrived.split(list(received)))

    def begin_pass_on(self, sent: torch.Tensor, arrived: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send to the next rank and to receive from the rank before; what it returns waits and gives that."""
        assert self.group is not None
        peers = [dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)]
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, sent, peers[0], self.group), dist.P2POp(dist.irecv, arrived, peers[1], self.group)]
        )

        def wait() -> torch.Tensor:
            for work in works:
                work.wait()
            return arrived

        return wait


@dataclass(frozen=True, slots=True)
class Reduction:
    """Sums partial results over a group and adds a row-parallel bias [N] once. See `profiler.layers.layer_inputs`."""

    group: RankGroup
    bias: torch.Tensor | None

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        """partial: [T, N], summed in place -> [T, N]."""
        return self._with_bias(self.group.sum(partial))

    def scatter(self, partial: torch.Tensor) -> torch.Tensor:
        """partial: [size * P, N] -> this rank's rows of the sum [P, N]."""
        return self._with_bias(self.group.sum_scatter(partial))

    def _with_bias(self, summed: torch.Tensor) -> torch.Tensor:
        return summed if self.bias is None else summed + self.bias


def _waiting(work: dist.Work, result: torch.Tensor, sent: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Wait for work, and keep what it sends until then."""
    kept = [sent]

    def wait() -> torch.Tensor:
        work.wait()
        kept.clear()
        return result

    return wait


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPair:
    """Another rank, the transport to it, and the process group with it if the transport needs one."""

    peer: int
    transport: Transport
    group: dist.ProcessGroup | None
    source: int = 0
    """Which of the stages that hand on hidden states to the receiver's the sender's is, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGroup:
    """The ranks of this host, over gloo."""

    ranks: tuple[int, ...]
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of one rank. Pairs are groups of two, one a direction: on NCCL all sends of one group wait for one
    another.
    """

    tensor: RankGroup
    sequence: RankGroup
    sequence_ranks: tuple[int, ...]  # its members; only this rank where there is no group
    inbound: Mapping[int, PeerPair]  # by the stage that hands on to this one
    outbound: Mapping[int, PeerPair]  # by the stage that this one hands on to
    hand_offs: Sequence[tuple[int, int]]  # all directed links between stages, in the same order on all ranks
    back: PeerPair | None  # on the first stage the last one, and the other way round
    everyone: dist.ProcessGroup  # all ranks, over gloo: barriers
    sharing: HostGroup | None  # the ranks whose memory this rank can write into


@contextmanager
def make_groups(mesh: Mesh, rank: int, device: torch.device) -> Iterator[Groups]:
    """Make the groups of a layout, in the same order on every rank, and leave them at the end."""
    mine: list[dist.ProcessGroup] = []

    def group_of(ranks: tuple[int, ...], *, backend: str | None = None, few_blocks: bool = False) -> dist.ProcessGroup:
        options = _few_blocks() if few_blocks and dist.get_backend() == "nccl" else None
        group: dist.ProcessGroup = dist.new_group(list(ranks), backend=backend, pg_options=options)
        if rank in ranks:
            mine.append(group)
        return group

    def pair_of(one: int, other: int, *, few_blocks: bool = False, source: int = 0) -> PeerPair | None:
        transport = hosts.transport(one, other)
        by_group = transport is Transport.COLLECTIVE
        group = group_of((one, other), few_blocks=few_blocks) if by_group else None
        if rank not in (one, other):
            return None
        return PeerPair(peer=other if rank == one else one, transport=transport, group=group, source=source)

    everyone = group_of(tuple(range(mesh.world_size)), backend="gloo")
    hosts = find_hosts(everyone, device)
    sharing = None
    for ranks in hosts.groups():
        group = group_of(ranks, backend="gloo")
        sharing = HostGroup(ranks=ranks, group=group) if rank in ranks else sharing
    tensor = sequence = None
    sequence_ranks: tuple[int, ...] = (rank,)
    for ranks in mesh.tensor_groups():
        group = group_of(ranks)
        tensor = group if rank in ranks else tensor
    for ranks in mesh.sequence_groups():
        group = group_of(ranks)
        if rank in ranks:
            sequence, sequence_ranks = group, ranks
    inbound, outbound = dict[int, PeerPair](), dict[int, PeerPair]()
    for first, second in mesh.boundaries():
        before, after = mesh.place(first)[0], mesh.place(second)[0]
        pair = pair_of(first, second, few_blocks=True, source=mesh.sources(after).index(before))
        if pair is not None:
            sides, stage = (inbound, before) if rank == second else (outbound, after)
            sides[stage] = pair
    back = None
    for first, last in mesh.returns():
        back = pair_of(first, last) or back
    yield Groups(
        tensor=RankGroup(tensor, mesh.tp_size, mesh.place(rank)[2]),
        sequence=RankGroup(sequence, mesh.sp_size, mesh.place(rank)[1]),
        sequence_ranks=sequence_ranks,
        inbound=inbound,
        outbound=outbound,
        hand_offs=mesh.hand_offs(),
        back=back,
        everyone=everyone,
        sharing=sharing,
    )
    # Not after an error: leaving a group waits for ranks that may have died.
    dist.barrier(everyone)
    for group in reversed(mine):
        dist.destroy_process_group(group)


def find_hosts(everyone: dist.ProcessGroup, device: torch.device) -> Hosts:
    """The host of every rank, gathered once. Ranks that one launcher or one agent of torchrun started share a host."""
    reached = device.type == "cuda" and nccl_link() in ("nvlink", "p2p")
    mine = Host(name=os.environ.get("GROUP_RANK", "0"), has_peer_memory=reached)
    found: list[Host] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=everyone)
    return agree(found)


def _few_blocks() -> dist.ProcessGroupNCCL.Options:
    """NCCL's kernels wait for their data on multiprocessors: two are enough for what a boundary carries."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas, options.config.max_ctas = 1, 2
    return options

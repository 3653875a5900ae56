"""The rank mesh: position of each rank of a layout, and the transport between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Ranks stage by stage, a stage's by their sequence-parallel rank, then by their tensor-parallel rank.

    Tensor-parallel neighbours, which exchange most, stand next to one another; a stage's ranks stand together.
    """

    pp_size: int = 1
    sp_size: int = 1
    tp_size: int = 1
    stage_of_group: tuple[int, ...] = ()
    """The stages that a round passes in turn, where it passes some several times; else each once."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp_size * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks that hold a stage together."""
        return self.sp_size * self.tp_size

    def rank(self, stage: int, sp_rank: int, tp_rank: int) -> int:
        """The global rank at this position."""
        return (stage * self.sp_size + sp_rank) * self.tp_size + tp_rank

    def place(self, rank: int) -> tuple[int, int, int]:
        """Stage, sp_rank and tp_rank of a global rank."""
        stage, member = divmod(rank, self.stage_size)
        return stage, *divmod(member, self.tp_size)

    def tensor_groups(self) -> Iterator[tuple[int, ...]]:
        """The ranks that share the products of the same rows; none where one rank does."""
        if self.tp_size > 1:
            for first in range(0, self.world_size, self.tp_size):
                yield tuple(range(first, first + self.tp_size))

    def sequence_groups(self) -> Iterator[tuple[int, ...]]:
        """The ranks that share the rows of a stage's rounds and hold the same part of its weights; none where one
        rank does."""
        if self.sp_size > 1:
            for stage in range(self.pp_size):
                for tp_rank in range(self.tp_size):
                    yield tuple(self.rank(stage, sp_rank, tp_rank) for sp_rank in range(self.sp_size))

    @property
    def last_stage(self) -> int:
        """The stage that a round leaves the pipeline from."""
        return self.stage_of_group[-1] if self.stage_of_group else self.pp_size - 1

    def hand_offs(self) -> list[tuple[int, int]]:
        """From which stage to which hidden states go, each way once, in the order in which a round first takes them."""
        passed = pairwise(self.stage_of_group or range(self.pp_size))
        return list(dict.fromkeys((source, target) for source, target in passed if source != target))

    def sources(self, stage: int) -> list[int]:
        """The stages that hand on to a stage."""
        return sorted(source for source, target in self.hand_offs() if target == stage)

    def boundaries(self) -> Iterator[tuple[int, int]]:
        """Sender and receiver of hidden states, of each way between stages: each rank hands on its own rows."""
        for source, target in self.hand_offs():
            for member in range(self.stage_size):
                yield source * self.stage_size + member, target * self.stage_size + member

    def returns(self) -> Iterator[tuple[int, int]]:
        """First and last rank of each way back from the last stage to the first; none where they are the same."""
        if self.last_stage:
            for member in range(self.stage_size):
                yield member, self.last_stage * self.stage_size + member


class Transport(StrEnum):
    """How two ranks exchange data."""

    PEER_MEMORY = "peer-memory"  # one card writes into the other's memory
    COLLECTIVE = "collective"  # NCCL or gloo


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host of a rank: ranks with equal names were started together on one machine."""

    name: str
    has_peer_memory: bool


@dataclass(frozen=True, slots=True)
class Hosts:
    """The host of every rank. Identical on all ranks, so that all make the same transport decisions."""

    of_rank: tuple[Host, ...]

    def transport(self, one: int, other: int) -> Transport:
        """How two ranks exchange hidden states."""
        first, second = self.of_rank[one], self.of_rank[other]
        reach = first.name == second.name and first.has_peer_memory and second.has_peer_memory
        return Transport.PEER_MEMORY if reach else Transport.COLLECTIVE

    def groups(self) -> list[tuple[int, ...]]:
        """The ranks of each host that has peer memory on all of its ranks, in the order of the first ranks."""
        names = dict.fromkeys(host.name for host in self.of_rank)
        ranks = [tuple(rank for rank, host in enumerate(self.of_rank) if host.name == name) for name in names]
        return [group for group in ranks if all(self.of_rank[rank].has_peer_memory for rank in group)]


def agree(hosts: Sequence[Host]) -> Hosts:
    """The hosts with peer memory only where all ranks of one host have it."""
    lacking = {host.name for host in hosts if not host.has_peer_memory}
    return Hosts(tuple(Host(name=host.name, has_peer_memory=host.name not in lacking) for host in hosts))

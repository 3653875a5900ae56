"""All links of a rank: between stages, from the last stage back to the first, and within a sequence-parallel group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from profiler.comm.links.buffers import STAGED
from profiler.comm.links.group import Groups, PeerPair, RankGroup
from profiler.comm.links.link import (
    CollectiveInbound,
    CollectiveOutbound,
    CollectiveReturn,
    Inbound,
    Outbound,
    Return,
)
from profiler.comm.links.mesh import Transport
from profiler.comm.links.peer_gather import PeerGatherGroup, gather_lanes
from profiler.comm.links.peer_link import HIDDEN, SLOTS, PeerInbound, PeerOutbound, PeerReturn, link_lanes
from profiler.comm.links.peer_memory import Lane, PeerMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLinks:
    """From and to other stages, by their index, and from the last stage to the first; None where there is none."""

    inbound: Mapping[int, Inbound]
    outbound: Mapping[int, Outbound]
    back: Return | None = None
    sequence: RankGroup = field(default_factory=RankGroup)

    def drain(self) -> None:
        """Wait for all sends."""
        for link in self.outbound.values():
            link.drain()
        if self.back:
            self.back.drain()


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSizes:
    """The largest hidden states that cross a boundary, [max_tokens, hidden_size], how many token ids go back, and how
    many numbers of keys and values a rank of a sequence-parallel group gathers of a layer at most."""

    max_tokens: int
    hidden_size: int
    num_requests: int
    gathered: int = 0


def make_links(groups: Groups, sizes: MessageSizes, device: torch.device, dtype: torch.dtype) -> RankLinks:
    """Make the links of a rank; all ranks of a host call it together, whatever each of them needs."""
    sequence, members = groups.sequence, groups.sequence_ranks
    memory = None
    gathers = sizes.gathered > 0 and groups.sharing is not None and set(members) <= set(groups.sharing.ranks)
    if groups.sharing is not None and (groups.hand_offs or gathers):
        lanes: list[Lane] = []
        if groups.hand_offs:
            lanes += link_lanes(
                max_tokens=sizes.max_tokens,
                hidden_size=sizes.hidden_size,
                dtype=dtype,
                num_requests=sizes.num_requests,
                num_sources=max(Counter(target for _, target in groups.hand_offs).values()),
            )
        if gathers:
            lanes += gather_lanes(len(members), sizes.gathered, dtype)
        channels = 2 * SLOTS if gathers else 0
        memory = PeerMemory(groups.sharing.group, groups.sharing.ranks, lanes, device, channels=channels)
        if gathers:
            sequence = PeerGatherGroup(sequence, members, memory, len(lanes) - len(members))
    size = (sizes.max_tokens, sizes.hidden_size)

    def inbound_of(pair: PeerPair) -> Inbound:
        if pair.transport is Transport.PEER_MEMORY:
            assert memory is not None
            return PeerInbound(memory, pair.peer, HIDDEN[pair.source])
        assert pair.group is not None
        return CollectiveInbound(
            pair.group, pair.peer, max_tokens=size[0], hidden_size=size[1], device=device, dtype=dtype
        )

    def outbound_of(pair: PeerPair) -> Outbound:
        if pair.transport is Transport.PEER_MEMORY:
            assert memory is not None
            staging = torch.empty(SLOTS, *size, device=device, dtype=dtype)
            return PeerOutbound(memory, pair.peer, staging, HIDDEN[pair.source])
        assert pair.group is not None
        staged = torch.empty(STAGED, *size, device=device, dtype=dtype) if device.type == "cuda" else None
        return CollectiveOutbound(pair.group, pair.peer, staging=staged)

    back: Return | None = None
    if pair := groups.back:
        if pair.transport is Transport.PEER_MEMORY:
            assert memory is not None
            back = PeerReturn(memory, pair.peer)
        else:
            assert pair.group is not None
            back = CollectiveReturn(pair.group, pair.peer, device=device)
    return RankLinks(
        inbound={stage: inbound_of(pair) for stage, pair in groups.inbound.items()},
        outbound={stage: outbound_of(pair) for stage, pair in groups.outbound.items()},
        back=back,
        sequence=sequence,
    )

"""The links of a stage across its two boundaries, by the means that its device offers."""

from __future__ import annotations

import torch

from profiler.peer import PeerRing, has_peer_memory
from runtime.group import Groups
from runtime.job import Job
from runtime.link import STAGED, CollectiveInbound, CollectiveOutbound, Inbound, Outbound
from runtime.peer_link import PeerInbound, PeerOutbound
from runtime.place import Place


def make_links(
    job: Job, place: Place, groups: Groups, device: torch.device, dtype: torch.dtype
) -> tuple[Inbound | None, Outbound | None]:
    """The way in from the stage before and the way out to the stage after; None at the ends of the pipeline."""
    # Decode hands on one row of every request.
    max_tokens, hidden_size = max(*job.round_tokens, len(job.requests)), job.shape.hidden_size
    inbound: Inbound | None = None
    outbound: Outbound | None = None
    if has_peer_memory(device):
        # In the order of the boundaries: making a ring waits for the other side.
        if groups.inbound:
            ring = PeerRing(groups.inbound, rows=max_tokens, width=hidden_size, device=device, dtype=dtype)
            inbound = PeerInbound(ring)
        if groups.outbound:
            ring = PeerRing(groups.outbound, rows=max_tokens, width=hidden_size, device=device, dtype=dtype)
            outbound = PeerOutbound(ring, device)
        return inbound, outbound
    if groups.inbound:
        before = place.peer(place.stage - 1)
        inbound = CollectiveInbound(
            groups.inbound, before, max_tokens=max_tokens, hidden_size=hidden_size, device=device, dtype=dtype
        )
    if groups.outbound:
        on_card = device.type == "cuda"
        staging = torch.empty(STAGED, max_tokens, hidden_size, device=device, dtype=dtype) if on_card else None
        outbound = CollectiveOutbound(groups.outbound, place.peer(place.stage + 1), staging=staging)
    return inbound, outbound

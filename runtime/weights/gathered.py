"""Weights of layers cut over a sequence-parallel group: each rank keeps a share, and layers are gathered ahead of use.

As fully sharded data parallelism does it (ZeRO stage 3; Rajbhandari et al., 2020), for models that do not fit whole on
every rank that shares the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from profiler.comm.links.group import RankGroup

BUFFERS = 2  # the layer that runs, and the next one


class GatheredWeights:
    """The gathered matrices of a rank's layers, in two buffers used in turn."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self._shares: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._begun: dict[int, Callable[[], torch.Tensor]] = {}

    def add(self, matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep this rank's share of the next layer's matrices -> where they lie in whole while the layer runs."""
        flat = torch.cat([matrix.reshape(-1) for matrix in matrices.values()])
        count = -(-flat.numel() // self.group.size)
        first = count * self.group.rank
        share = flat.new_zeros(count)
        mine = flat[first : first + count]
        share[: mine.numel()] = mine
        index = len(self._shares)
        self._shares.append(share)
        whole = self._buffer(index, count * self.group.size, flat)
        views, at = dict[str, torch.Tensor](), 0
        for name, matrix in matrices.items():
            views[name] = whole[at : at + matrix.numel()].view(matrix.shape)
            at += matrix.numel()
        return views

    def begin(self, index: int) -> None:
        """Begin to gather a layer. The one before last in the order of calls must have run, or be queued to."""
        share = self._shares[index]
        whole = self._buffers[index % BUFFERS][: share.numel() * self.group.size]
        self._begun[index] = self.group.begin_gather(share, into=whole)

    def wait(self, index: int) -> None:
        """Wait for the layer: on a card the current stream does, not the host."""
        self._begun.pop(index)()

    def _buffer(self, index: int, numbers: int, like: torch.Tensor) -> torch.Tensor:
        """A layer's buffer; all layers' matrices must have as many numbers as the first ones'."""
        if index < BUFFERS:
            self._buffers.append(like.new_empty(numbers))
        buffer = self._buffers[index % BUFFERS]
        if numbers > buffer.numel():
            raise RuntimeError(f"layer {index} has more numbers than the layers before it")
        return buffer[:numbers]

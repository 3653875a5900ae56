"""The process groups of a rank: its tensor-parallel group, a pair for each stage boundary, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from profiler.layer import Reduce
from runtime.place import Place

# Torch 2.13 gave it a new name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TensorGroup:
    """The ranks that hold a stage together; a group of one moves nothing."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        self.group, self.size = group, size

    def reduce(self, bias: torch.Tensor | None) -> Reduce:
        """Make the function that sums partial results [T, N] in place and adds a row-parallel bias [N] once."""

        def sum_ranks(partial: torch.Tensor) -> torch.Tensor:
            if self.group is not None:
                dist.all_reduce(partial, group=self.group)
            return partial if bias is None else partial + bias

        return sum_ranks

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack the tensors of all ranks: [...] -> [size, ...]."""
        stacked = tensor.new_empty((self.size, *tensor.shape))
        _all_gather(stacked.view(-1), tensor.reshape(-1), group=self.group)
        return stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of one rank. Pairs are groups of two: on NCCL all sends of one group wait for one another."""

    tensor: TensorGroup
    inbound: dist.ProcessGroup | None  # with the stage before
    outbound: dist.ProcessGroup | None  # with the stage after
    back: dist.ProcessGroup | None  # last stage -> first stage: token ids and acknowledgements
    host: dist.ProcessGroup  # all ranks, over gloo: barriers


@contextmanager
def make_groups(place: Place) -> Iterator[Groups]:
    """Make the groups of a plan's ranks, in the same order on every rank, and leave them at the end."""
    tp_size, pp_size = place.parallel.tp_size, place.parallel.pp_size
    rank = place.peer(place.stage)
    mine: list[dist.ProcessGroup] = []

    def group_of(*ranks: int, few_blocks: bool = False) -> dist.ProcessGroup | None:
        options = _few_blocks() if few_blocks and dist.get_backend() == "nccl" else None
        group: dist.ProcessGroup = dist.new_group(list(ranks), pg_options=options)
        if rank not in ranks:
            return None
        mine.append(group)
        return group

    tensor = inbound = outbound = back = None
    for stage in range(pp_size):
        if tp_size > 1:
            tensor = group_of(*range(stage * tp_size, (stage + 1) * tp_size)) or tensor
    for stage in range(pp_size - 1):
        for tp_rank in range(tp_size):
            first, second = stage * tp_size + tp_rank, (stage + 1) * tp_size + tp_rank
            pair = group_of(first, second, few_blocks=True)
            inbound = pair if rank == second else inbound
            outbound = pair if rank == first else outbound
    if pp_size > 1:
        for tp_rank in range(tp_size):
            back = group_of(tp_rank, (pp_size - 1) * tp_size + tp_rank) or back
    host = dist.new_group(backend="gloo")
    yield Groups(
        tensor=TensorGroup(tensor, tp_size),
        inbound=inbound,
        outbound=outbound,
        back=back,
        host=host,
    )
    # Not on the way out of an error: leaving a group waits for ranks that may be gone.
    dist.barrier(host)
    for group in (*mine, host):
        dist.destroy_process_group(group)


def _few_blocks() -> dist.ProcessGroupNCCL.Options:
    """NCCL's kernels wait for their data on multiprocessors: two are enough for what a boundary carries."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas, options.config.max_ctas = 1, 2
    return options

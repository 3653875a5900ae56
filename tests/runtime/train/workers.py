"""What ranks of tests run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from profiler.comm.links.group import make_groups
from profiler.comm.ranks.rank import RankContext
from runtime.job.place import mesh_of
from runtime.train.exchange import make_ways
from runtime.train.parameters import checkpoint_tensors
from runtime.train.rank import Trainer, TrainJob, TrainReport
from runtime.train.saving import gathered


def gradients(context: RankContext, jobs: Sequence[TrainJob]) -> list[dict[str, torch.Tensor]]:
    """Of each job, gradients of the first step's loss, whole, under the names of the checkpoint's tensors."""
    return [_gradients(context, job) for job in jobs]


def _gradients(context: RankContext, job: TrainJob) -> dict[str, torch.Tensor]:
    mesh = mesh_of(job.parallel)
    found: dict[str, torch.Tensor] = {}
    with make_groups(mesh, context.rank, context.device) as groups, make_ways(mesh, context.rank) as ways:
        trainer = Trainer(context, job, groups, ways)
        trainer.compute_grads(0)
        group = groups.tensor.group
        for parameter in trainer.stage.parameters:
            assert parameter.grads is not None
            parts = [parameter.grads]
            if parameter.is_cut and group is not None:
                parts = gathered(parameter.grads, group)
            elif group is not None:  # what ranks hold alike they must have alike
                first = parameter.grads.clone()
                dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
                assert torch.equal(first, parameter.grads), parameter.name
            found |= {name: tensor.clone() for name, tensor in checkpoint_tensors(parameter, parts)}
    return found


def curves(context: RankContext, jobs: Sequence[TrainJob]) -> list[tuple[TrainReport, dict[str, torch.Tensor]]]:
    """What each job's training reports, and this rank's master copies at its end."""
    found = []
    for job in jobs:
        mesh = mesh_of(job.parallel)
        with make_groups(mesh, context.rank, context.device) as groups, make_ways(mesh, context.rank) as ways:
            trainer = Trainer(context, job, groups, ways)
            report = trainer.run()
            masters = {each.name: each.master for each in trainer.stage.parameters if each.master is not None}
            found.append((report, {name: master.detach().clone() for name, master in masters.items()}))
    return found

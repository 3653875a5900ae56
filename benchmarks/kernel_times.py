"""Where the time of a plan's rounds goes on cards: the kernels of each stage by kind, beside what the rounds took.

    python -m benchmarks.kernel_times PLAN... [--no-overlap]

Random weights; kernels of several queues count each in full.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from profiler.comm.links.group import make_groups
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext
from profiler.hardware.device import describe_hardware
from runtime.job.job import RunJob
from runtime.job.place import Place, mesh_of
from runtime.run.clock import make_clock
from runtime.run.pipeline import Pipeline
from runtime.run.run import make_job
from runtime.stage.stage import KernelStage
from service.cli.output import print_table
from tuner.plan.plan import load_plan

# Parts of kernel names, the first that is found counts.
KINDS = {
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "waiting": ("wait_signal", "put_signal"),
    "collective": ("nccl",),
    "element-wise": ("_rms_norm", "_silu_product", "_rotate_into_slab", "_write_gathered"),
    "copies": ("memcpy", "memset"),
    "products": ("gemm", "nvjet", "cutlass", "splitk"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """One pass over the rounds on one rank, in seconds."""

    by_kind: dict[str, float]
    pass_s: float
    span_s: float  # of the pass that was recorded, from the first kernel's start to the last one's end
    idle_s: float  # of it, without any kernel

    @property
    def kernels_s(self) -> float:
        """All kernels but those that wait for another rank."""
        return sum(seconds for kind, seconds in self.by_kind.items() if kind != "waiting")


@torch.inference_mode()
def time_kernels(context: RankContext, jobs: Sequence[RunJob]) -> list[KernelTimes]:
    """Run each job as one of its ranks, a pass to warm up, one timed by events, and one under torch's profiler."""
    found = []
    for job in jobs:
        place = Place.of(context.rank, job.parallel)
        with make_groups(mesh_of(job.parallel), context.rank, context.device) as groups:
            stage = KernelStage(job, place, groups, context.device)
            clock = make_clock(context.device)
            pipeline = Pipeline(job, place, groups, stage, clock, context.progress)
            pipeline.warm_up()
            pipeline.record()
            for _ in range(4):
                torch.cuda.synchronize()
                dist.barrier(groups.everyone)
                clock.begin()
                pipeline.prefill()
                intervals = clock.intervals()
            dist.barrier(groups.everyone)
            clock.begin()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                pipeline.prefill()
                torch.cuda.synchronize()
            pipeline.close()
        by_kind: dict[str, float] = {}
        busy: list[tuple[float, float]] = []
        for event in profile.events() or ():
            if event.device_type == torch._C._autograd.DeviceType.CUDA:
                kind = kind_of(event.name)
                by_kind[kind] = by_kind.get(kind, 0.0) + event.device_time_total * 1e-6
                busy.append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
        found.append(
            KernelTimes(
                by_kind=by_kind,
                span_s=max(end for _, end in busy) - min(start for start, _ in busy),
                idle_s=idle_s(busy),
                pass_s=intervals[-1][1],
            )
        )
    return found


def idle_s(busy: Sequence[tuple[float, float]]) -> float:
    """Seconds between the first start and the last end in which nothing runs."""
    idle, reached = 0.0, min(start for start, _ in busy)
    for start, end in sorted(busy):
        idle += max(0.0, start - reached)
        reached = max(reached, end)
    return idle


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lowered = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lowered for part in parts):
            return kind
    return "other"


def main() -> None:
    """Run the plans, those of as many ranks in one launch, and print a line for each plan and rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--no-overlap", action="store_true", help="exchanges wait for compute, and compute for them")
    options = parser.parse_args()
    hardware = describe_hardware("cuda", num_threads=1)
    of_size: dict[int, list[tuple[str, RunJob]]] = defaultdict(list)
    for path in options.plans:
        job = make_job(load_plan(path), hardware, (), device_type="cuda")
        of_size[job.parallel.world_size].append((path.stem, replace(job, overlaps=not options.no_overlap)))
    table: list[list[object]] = []
    for world_size, named in sorted(of_size.items()):
        jobs = [job for _, job in named]
        reports = run_ranks(time_kernels, jobs, world_size=world_size, device_type="cuda", num_threads=1)
        for (name, _), times in zip(named, zip(*reports, strict=True), strict=True):
            for rank, one in enumerate(times):
                kinds = [one.by_kind.get(kind, 0.0) for kind in (*KINDS, "other")]
                table.append([name, rank, one.pass_s, one.span_s, one.idle_s, one.kernels_s, *kinds])
    print_table(["plan", "rank", "pass s", "span s", "idle s", "kernels s", *KINDS, "other"], table, title="Seconds")


if __name__ == "__main__":
    main()

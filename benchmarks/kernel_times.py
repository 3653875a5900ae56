"""Where the time of a plan's rounds goes on cards: the kernels of each stage by kind, beside what the rounds took.

python -m benchmarks.kernel_times [--model NAME] [--db URL] [--budget-s S]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.measured_plans import Case, Machine
from profiler.comm.links.group import make_groups
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext
from runtime.job.job import Job
from runtime.job.place import Place, mesh_of
from runtime.run.clock import make_clock
from runtime.run.pipeline import Pipeline
from runtime.run.run import make_job
from runtime.stage.stage import Stage
from service.cli.output import print_table

# Parts of kernel names, the first that is found counts.
KINDS = {
    "attention": ("sdpa", "fmha", "flash", "attention"),
    "waiting": ("wait_signal", "put_signal"),
    "collective": ("nccl",),
    "element-wise": ("_rms_norm", "_silu_product", "_rotate_into_slab"),
    "copies": ("memcpy", "memset"),
    "products": ("gemm", "nvjet", "cutlass", "splitk"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTimes:
    """One pass over the rounds on one rank, in seconds."""

    by_kind: dict[str, float]
    rounds_s: float  # from each round's start to its finish, added up
    pass_s: float

    @property
    def kernels_s(self) -> float:
        """All kernels but those that wait for another rank."""
        return sum(seconds for kind, seconds in self.by_kind.items() if kind != "waiting")


@torch.inference_mode()
def time_kernels(context: RankContext, jobs: Sequence[Job]) -> list[KernelTimes]:
    """Run each job as one of its ranks, a pass to warm up, one timed by events, and one under torch's profiler."""
    found = []
    for job in jobs:
        place = Place.of(context.rank, job.parallel)
        with make_groups(mesh_of(job.parallel), context.rank, context.device) as groups:
            stage = Stage(job, place, groups, context.device)
            clock = make_clock(context.device)
            pipeline = Pipeline(job, place, groups, stage, clock, context.progress)
            pipeline.warm_up()
            pipeline.record()
            for _ in range(2):
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
        for event in profile.events() or ():
            if event.device_type == torch._C._autograd.DeviceType.CUDA:
                kind = kind_of(event.name)
                by_kind[kind] = by_kind.get(kind, 0.0) + event.device_time_total * 1e-6
        found.append(
            KernelTimes(
                by_kind=by_kind, rounds_s=sum(finish - start for start, finish in intervals), pass_s=intervals[-1][1]
            )
        )
    return found


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    lowered = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lowered for part in parts):
            return kind
    return "other"


def main() -> None:
    """A prompt of 32768 tokens on two stages, on two tensor-parallel ranks and on one card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--db", default="sqlite:///gpu.db")
    parser.add_argument("--budget-s", type=float, default=150.0)
    options = parser.parse_args()
    machine = Machine(
        options.model, database_url=options.db, context_length=131072, budget_s=options.budget_s, device_type="cuda",
        dtype="bfloat16", chunk_multiple=256,
    )  # fmt: skip
    launches = [
        [Case(tp_size=1, pp_size=2, prompt_lens=(32768,)), Case(tp_size=2, pp_size=1, prompt_lens=(32768,))],
        [Case(tp_size=1, pp_size=1, prompt_lens=(32768,), policy="fixed:2048")],
    ]
    table: list[list[object]] = []
    for cases in launches:
        jobs = [make_job(machine.plan(case), machine.hardware, machine.rows, device_type="cuda") for case in cases]
        world_size = cases[0].tp_size * cases[0].pp_size
        reports = run_ranks(time_kernels, jobs, world_size=world_size, device_type="cuda", num_threads=1)
        for rank, times in enumerate(reports):
            for case, one in zip(cases, times, strict=True):
                kinds = [one.by_kind.get(kind, 0.0) for kind in (*KINDS, "other")]
                table.append([case.name, rank, one.pass_s, one.rounds_s, one.kernels_s, *kinds])
    print_table(["plan", "rank", "pass s", "rounds s", "kernels s", *KINDS, "other"], table, title="Seconds")


if __name__ == "__main__":
    main()

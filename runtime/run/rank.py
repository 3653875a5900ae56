"""One rank's whole run: load, warm up, fill cached prompts, run the rounds on the clock, decode, report."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from profiler.comm.links.group import Groups, make_groups
from profiler.comm.ranks.mark import Doing, Phase
from profiler.comm.ranks.rank import RankContext
from profiler.model import Backend
from runtime.job.job import Pass, RankReport, RunJob
from runtime.job.place import Place, mesh_of
from runtime.run.card_marks import CardMarks
from runtime.run.clock import make_clock
from runtime.run.pipeline import Pipeline
from runtime.stage.stage import KernelStage

if TYPE_CHECKING:
    from runtime.stage.library_stage import LibraryStage


@torch.inference_mode()
def run_jobs(context: RankContext, jobs: Sequence[RunJob]) -> list[RankReport]:
    """Run jobs as one of their ranks; the function that `profiler.comm.ranks.launch.run_ranks` starts on each.

    All take as many ranks; starting them takes seconds, and so does joining them, which jobs of one layout share.
    Each report is also handed on at once: it outlives the failure of a later job.
    """
    for job in jobs:
        _stage_kind(job.shape.backend)
    gc.freeze()  # all that the imports made: collections, which may come among the rounds, walk what the jobs make
    reports: list[RankReport] = []
    for mesh, alike in groupby(jobs, key=lambda job: mesh_of(job.parallel)):
        context.progress.enter(Phase.GROUPS, job=len(reports))
        with make_groups(mesh, context.rank, context.device) as groups:
            for job in alike:
                context.progress.enter(Phase.LOAD, job=len(reports))
                reports.append(_run_job(context, job, groups))
                context.report(reports[-1])
    return reports


def _run_job(context: RankContext, job: RunJob, groups: Groups) -> RankReport:
    place = Place.of(context.rank, job.parallel)
    clock = make_clock(context.device)
    progress = context.progress

    def begin() -> None:
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        progress.wait(Doing.MEET)
        dist.barrier(groups.everyone)
        progress.work()
        clock.begin()

    def note(order: Sequence[int] | None = None) -> Pass:
        intervals = clock.intervals()
        return Pass(origin_s=clock.origin_s, rounds=tuple(intervals[at] for at in order or range(len(intervals))))

    def run_pass() -> Pass:
        begin()
        pipeline.prefill()
        return note(pipeline.tasks.by_round)

    if context.device.type == "cuda":
        gc.collect()  # what the job before left, recordings in cycles too
        torch.cuda.empty_cache()  # peer memory and NCCL allocate beside torch
        torch.cuda.reset_peak_memory_stats()
    begin()
    slowdowns = [job.probe.slowdown()] if job.probe and context.device.type != "cuda" else []
    begin()
    stage = _stage_kind(job.shape.backend)(job, place, groups, context.device)
    progress.enter(Phase.LINKS)
    pipeline = Pipeline(job, place, groups, stage, clock, progress)
    begin()
    progress.enter(Phase.WARM_UP)
    pipeline.warm_up()
    pipeline.fill_cache()
    progress.enter(Phase.RECORD)
    pipeline.record()
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
        gc.freeze()  # what kernels imported on their way, too
    warm_up_s = time.perf_counter() - clock.origin_s
    progress.enter(Phase.RUN)
    with CardMarks.of(clock, pipeline, progress) as marks:
        first = _settle(job, run_pass, groups)
        passes = tuple(run_pass() for _ in range(job.repeat))
        begin()
        progress.enter(Phase.DECODE)
        marks.is_decoding = True
        new_ids = pipeline.decode(job.max_new_tokens - 1)
        decode = note()
    memory_bytes = _memory_bytes(context.device)
    begin()
    slowdowns += _slowdown(job, pipeline, groups, context.device)
    pipeline.close()
    if context.device.type == "cuda":
        gc.unfreeze()  # recordings in cycles
    reports_tokens = place.is_last and place.tp_rank == place.sp_rank == 0
    return RankReport(
        stage=place.stage,
        groups=place.groups,
        host=socket.gethostname(),
        warm_up_s=warm_up_s,
        first=first,
        passes=passes,
        decode=decode,
        slowdown=sum(slowdowns) / len(slowdowns) if slowdowns else None,
        memory_bytes=memory_bytes,
        token_ids=tuple(tuple(ids) for ids in new_ids.T.tolist()) if reports_tokens else None,
    )


def _stage_kind(backend: Backend) -> type[KernelStage] | type[LibraryStage]:
    if backend is Backend.OWN:
        return KernelStage
    from runtime.stage.library_stage import LibraryStage  # brings Transformers along: seconds of every start

    return LibraryStage


def _slowdown(job: RunJob, pipeline: Pipeline, groups: Groups, device: torch.device) -> list[float]:
    """Of the machine since its profile, if that can be told; all ranks ask at once, as they did there."""
    if job.probe is None:
        return []
    if device.type != "cuda":
        return [job.probe.slowdown()]
    run_round = pipeline.middle_round()
    found = job.probe.slowdown_among(run_round, groups, device) if run_round else None
    return [] if found is None else [found]


def _memory_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)  # libraries, peer memory, and what others hold
    return beside + torch.cuda.max_memory_reserved(device)


def _settle(job: RunJob, run_pass: Callable[[], Pass], groups: Groups) -> Pass | None:
    """Run passes that do not count; the first rank tells all when it is enough. Returns the very first, if any."""
    first: Pass | None = None
    started = time.perf_counter()
    enough = torch.tensor([job.settle_s <= 0.0])
    while not enough.item():
        done = run_pass()
        first = first or done
        enough[0] = time.perf_counter() - started >= job.settle_s
        dist.broadcast(enough, 0, group=groups.everyone)
    return first

"""A whole model in every precision on one card: to the first token and a token of decode, interleaved, by kernel.

`benchmarks.gpu_precisions` starts it. Random weights; static ranges hold four standard deviations.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from profiler.comm.links.group import Groups, make_groups
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext
from profiler.hardware.device import describe_hardware
from profiler.kernels.entry import Product
from profiler.kernels.quantized import linear as quantized_linear
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.model import ModelShape
from runtime.job.job import RunJob
from runtime.job.place import Place, mesh_of
from runtime.run.clock import RoundClock, make_clock
from runtime.run.pipeline import Pipeline
from runtime.run.run import make_job
from runtime.stage.stage import KernelStage
from tuner.plan.plan import Chunk, Parallel, Plan, Request

UNFUSED = " unfused"  # after the name of a precision: its kernels one by one
ROW = "@row "  # before a line that is a row of the results
PROFILED_KERNELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt, and how often it is run in each precision."""

    prompt_tokens: int
    chunk: int
    new_tokens: int = 1
    repeats: int = 5


def emit(**row: object) -> None:
    """Hand a row of the results to the process that collects them."""
    print(ROW + json.dumps(row), flush=True)


def run_case(case: Case, arms: Sequence[str], shape: ModelShape, device_type: str) -> None:
    """Run all arms side by side in one process, in turn; each row goes out as soon as it is known."""
    hardware = describe_hardware(device_type, num_threads=1)
    jobs = [
        make_job(
            make_plan(shape, case, arm.removesuffix(UNFUSED)), hardware, (), device_type=device_type,
            max_new_tokens=case.new_tokens,
        )
        for arm in arms
    ]  # fmt: skip
    run_ranks(
        time_arms, list(arms), jobs, case.repeats, world_size=1, device_type=device_type, num_threads=1,
        stall_timeout_s=300.0,
    )  # fmt: skip


def make_plan(shape: ModelShape, case: Case, precision: str) -> Plan:
    """The prompt on one rank in chunks of the case's size."""
    starts = range(0, case.prompt_tokens, case.chunk)
    return Plan(
        model=shape.config,
        precision=precision,
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,)),
        requests=(Request(id="r0", prompt_tokens=case.prompt_tokens),),
        rounds=tuple((Chunk(0, start, min(case.chunk, case.prompt_tokens - start)),) for start in starts),
    )


@torch.inference_mode()
def time_arms(context: RankContext, arms: Sequence[str], jobs: Sequence[RunJob], repeats: int) -> None:
    """As the only rank: build every arm, then run them in turn, then look at the kernels of each."""
    with ExitStack() as stack:
        groups = stack.enter_context(make_groups(mesh_of(jobs[0].parallel), context.rank, context.device))
        clock = make_clock(context.device)
        pipelines: dict[str, Pipeline] = {}
        for arm, job in zip(arms, jobs, strict=True):
            context.progress.work()
            with guarded(arm):
                pipelines[arm] = make_pipeline(arm, job, groups, clock, context)
                stack.callback(pipelines[arm].close)
        samples: dict[str, list[tuple[float, float | None]]] = {arm: [] for arm in pipelines}
        for repeat in range(repeats + 1):
            for arm, pipeline in list(pipelines.items()):
                context.progress.work()
                with guarded(arm):
                    found = time_pass(pipeline, clock, groups)
                    if repeat:  # the first brings everything to the card
                        samples[arm].append(found)
        for arm, of_arm in samples.items():
            if of_arm:
                emit_times(arm, pipelines[arm].job, of_arm)
        if context.device.type == "cuda":
            for arm, pipeline in pipelines.items():
                context.progress.work()
                with guarded(arm):
                    emit_kernels(arm, pipeline, clock, groups)


@contextmanager
def guarded(arm: str) -> Iterator[None]:
    """What fails in one arm is a row, and the others go on."""
    try:
        yield
    except Exception as error:
        emit(part="failure", arm=arm, error=f"{type(error).__name__}: {error}"[:2000])


def make_pipeline(arm: str, job: RunJob, groups: Groups, clock: RoundClock, context: RankContext) -> Pipeline:
    """Weights, slab and recordings of one arm."""
    place = Place.of(context.rank, job.parallel)
    make_linear: Callable[..., Product] = unfused_linear if arm.endswith(UNFUSED) else quantized_linear.make_linear
    with patch("runtime.weights.shard.make_linear", make_linear):
        stage = KernelStage(job, place, groups, context.device)
    pipeline = Pipeline(job, place, groups, stage, clock, context.progress)
    pipeline.warm_up()
    pipeline.record()
    return pipeline


def unfused_linear(*arguments: Any, **options: Any) -> Product:
    """As `make_linear`, its kernels one by one."""
    made = quantized_linear.make_linear(*arguments, **options)
    if isinstance(made, DequantizingLinear | QuantizedLinear):
        made.fused = False
    if isinstance(made, QuantizedLinear):
        entry = made.entry
        made.entry = QuantizingEntry(dtype=entry.dtype, scale=entry.scale, offset=entry.offset, fused=False)
    return made


def time_pass(pipeline: Pipeline, clock: RoundClock, groups: Groups) -> tuple[float, float | None]:
    """Seconds to the first token, and seconds a token after it."""
    begin(clock, groups)
    pipeline.prefill()
    first_s = clock.intervals()[-1][1]
    steps = pipeline.job.max_new_tokens - 1
    if not steps:
        return first_s, None
    begin(clock, groups)
    pipeline.decode(steps)
    intervals = clock.intervals()
    return first_s, (intervals[-1][1] - intervals[0][0]) / steps


def begin(clock: RoundClock, groups: Groups) -> None:
    """Start a pass on an idle device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier(groups.everyone)
    clock.begin()


def emit_times(arm: str, job: RunJob, samples: Sequence[tuple[float, float | None]]) -> None:
    """Medians of an arm, and how far its passes were apart."""
    firsts = [first for first, _ in samples]
    steps = [step for _, step in samples if step is not None]
    emit(
        part="model",
        arm=arm,
        prompt_tokens=job.requests[0].prompt_tokens,
        chunk=max(job.round_tokens),
        first_token_ms=statistics.median(firsts) * 1e3,
        spread=(max(firsts) - min(firsts)) / statistics.median(firsts),
        token_ms=statistics.median(steps) * 1e3 if steps else None,
    )


def emit_kernels(arm: str, pipeline: Pipeline, clock: RoundClock, groups: Groups) -> None:
    """Milliseconds of each kernel in one pass; of a decode where there is one."""
    steps = pipeline.job.max_new_tokens - 1
    begin(clock, groups)
    if steps:
        pipeline.prefill()
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        if steps:
            pipeline.decode(steps)
        else:
            pipeline.prefill()
        torch.cuda.synchronize()
    by_name: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.device_type == torch._C._autograd.DeviceType.CUDA:
            by_name[event.name[:100]] += event.device_time_total * 1e-3
    scale = 1.0 / max(1, steps)
    emit(
        part="kernels", arm=arm, prompt_tokens=pipeline.job.requests[0].prompt_tokens, decode=bool(steps),
        ms={name: ms * scale for name, ms in by_name.most_common(PROFILED_KERNELS)},
        all_ms=sum(by_name.values()) * scale,
    )  # fmt: skip

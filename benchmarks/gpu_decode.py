"""Seconds a token of decode on cards, recorded and launched kernel by kernel, beside what reading memory alone takes.

    python -m benchmarks.gpu_decode [--model NAME] [--layouts one PP2 TP2] [--bandwidth-tb-s S] [--device cpu]

Random weights in bfloat16. The floor is the bytes that a step must read, all weights once and the keys and values of
all tokens, over the published bandwidth of a card: one after another on the stages of PP, at once on the ranks of TP.
`--device cpu` is a dry run on a small model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar
from unittest.mock import patch

from benchmarks.demo_model import SMALL, write_demo_model
from db.rows.hardware import Hardware
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext
from profiler.hardware.device import describe_hardware
from profiler.model import PRECISIONS, ModelShape, load_model_shape
from runtime.job.job import RankReport, RunJob
from runtime.run.prediction import Prediction
from runtime.run.rank import run_jobs
from runtime.run.result import make_result
from runtime.run.run import make_job
from service.cli.output import print_table
from tuner.plan.plan import Chunk, Parallel, Plan, Request

T = TypeVar("T")

LAYOUTS = {"one": (1, 1), "PP2": (1, 2), "TP2": (2, 1)}  # (tp_size, pp_size)
BATCHES = {"cuda": ((4096,) * 8, (32768,)), "cpu": ((96,) * 8, (768,))}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
CHUNK = 4096
NEW_TOKENS = 32
H100_TB_S = 3.35  # published, of the SXM card


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One way of decoding a batch."""

    token_s: float  # median over the steps
    first_s: float  # from the barrier to the first step's token


def both_ways(context: RankContext, jobs: Sequence[RunJob]) -> tuple[list[RankReport], list[RankReport]]:
    """Run jobs as they are, and with all kernels launched one by one."""
    recorded = run_jobs(context, jobs)
    with patch("runtime.run.pipeline.record", _launched):
        return recorded, run_jobs(context, jobs)


def _launched(work: Callable[[], T], *_: object) -> Callable[[], T]:
    return work


def make_plan(shape: ModelShape, layout: tuple[int, int], prompt_lens: Sequence[int], dtype: str) -> Plan:
    """The prompts one after another in chunks of CHUNK tokens, layers in equal parts."""
    tp_size, pp_size = layout
    base, rest = divmod(shape.num_layers, pp_size)
    return Plan(
        model=shape.config,
        precision=dtype,
        parallel=Parallel(
            tp_size=tp_size, pp_size=pp_size, layer_partition=tuple(base + (stage < rest) for stage in range(pp_size))
        ),
        requests=tuple(Request(id=f"r{index}", prompt_tokens=length) for index, length in enumerate(prompt_lens)),
        rounds=tuple(
            (Chunk(index, start, min(CHUNK, length - start)),)
            for index, length in enumerate(prompt_lens)
            for start in range(0, length, CHUNK)
        ),
    )


def read_bytes(job: RunJob) -> int:
    """Bytes that the ranks of one tp_rank read in a step, all stages together, at the middle of the decode."""
    shape, tp_size, precision = job.shape, job.parallel.tp_size, PRECISIONS[job.dtype]
    weights = sum(layer.num_elements(tp_size) for layer in shape.layers) + shape.head.num_elements(tp_size)
    tokens = sum(request.prompt_tokens + job.max_new_tokens // 2 for request in job.requests)
    kv = sum(
        precision.kv_bytes(tokens * layer.attention.kv_elements(tp_size), layer.attention.head_dim)
        for layer in shape.layers
    )
    return precision.weights.num_bytes(weights) + kv


def decoded(job: RunJob, reports: Sequence[RankReport]) -> Decoded:
    """What a job's ranks measured."""
    nothing = Prediction(makespan_s=None, timeline=None)
    first, *others = make_result(job, reports, prediction=nothing, end_ids=frozenset()).decode_s
    return Decoded(token_s=median(others), first_s=first)


def measure(
    shape: ModelShape, layouts: Sequence[str], hardware: Hardware, device_type: str, tb_s: float
) -> list[list[object]]:
    """Rows of the table: layouts of as many ranks on the same ones, every batch."""
    dtype, rows = DTYPES[device_type], list[list[object]]()
    cases = [(name, lens) for name in layouts for lens in BATCHES[device_type]]
    jobs = [
        make_job(
            make_plan(shape, LAYOUTS[name], lens, dtype), hardware, (), device_type=device_type,
            max_new_tokens=NEW_TOKENS,
        )
        for name, lens in cases
    ]  # fmt: skip
    reports = run_ranks(both_ways, jobs, world_size=jobs[0].parallel.world_size, device_type=device_type, num_threads=1)
    for index, ((name, lens), job) in enumerate(zip(cases, jobs, strict=True)):
        replayed, launched = (decoded(job, [of_rank[way][index] for of_rank in reports]) for way in range(2))
        size = read_bytes(job)
        floor_s = size / (tb_s * 1e12)
        rows.append([
            name, f"{len(lens)} x {lens[0]}", launched.token_s * 1e3, replayed.token_s * 1e3, replayed.first_s * 1e3,
            floor_s * 1e3, replayed.token_s / floor_s, size / replayed.token_s / 1e12,
        ])  # fmt: skip
    return rows


def main() -> None:
    """Decode both batches on each layout, both ways, and print milliseconds a token."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3-8b", help="a bundled shape, or a folder with a config.json")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--bandwidth-tb-s", type=float, default=H100_TB_S, help="of one card's memory")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    hardware = describe_hardware(options.device, num_threads=1)
    rows: list[list[object]] = []
    with TemporaryDirectory() as folder:
        if options.device == "cpu":
            write_demo_model(Path(folder) / "model", SMALL)
        shape = load_model_shape(str(Path(folder) / "model") if options.device == "cpu" else options.model)
        for world in (1, 2):
            layouts = [name for name in options.layouts if LAYOUTS[name][0] * LAYOUTS[name][1] == world]
            if layouts:
                rows += measure(shape, layouts, hardware, options.device, options.bandwidth_tb_s)
    print_table(
        ["layout", "prompts", "launched ms", "recorded ms", "first step ms", "floor ms", "recorded / floor", "TB/s"],
        rows,
        title=f"A token of decode, {shape.name} in {DTYPES[options.device]}, {NEW_TOKENS} new tokens",
    )


if __name__ == "__main__":
    main()

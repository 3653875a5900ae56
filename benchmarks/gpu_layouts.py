"""Every layout of the ranks there are, many plans in a row on one launch: none may hang, all tokens must be right.

    python -m benchmarks.gpu_layouts [--ranks N] [--times N] [--launches N] [--device cpu]

Each of a launch's plans has another window, other rounds and its own links; tokens are compared with those of
Transformers in float32. More ranks than cards share them in turns, on pipelines alone: NCCL takes one rank a card.
`TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1` lets such ranks share memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.demo_model import DemoSize, write_demo_model
from profiler.comm.ranks.launch import run_ranks
from profiler.kernels.attention import available_kernels
from profiler.model import ModelShape, load_model_shape
from profiler.sequence.kind import CUTS, SPKind
from runtime.job.job import RunJob
from runtime.run.rank import run_jobs
from runtime.run.reference import check_tokens
from runtime.run.result import RequestResult
from service.cli.output import print_table
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.layout import layout_of
from tuner.plan.plan import Chunk, Parallel, Request, Round
from tuner.plan.stage_order import StageOrder
from tuner.search.partition import even_partition

LENGTHS = (517, 260, 33)
NEW_TOKENS = 6
MODEL = DemoSize(hidden_size=256, intermediate_size=768, num_layers=8, num_heads=8, num_kv_heads=8)
STALL_S = 60.0


def layouts(num_ranks: int, num_devices: int) -> Iterator[Parallel]:
    """Every layout of at most `num_ranks` ranks; only pipelines where ranks share cards."""
    for world_size in range(1, num_ranks + 1):
        for stage_size in divisors(world_size):
            for tp_size in divisors(stage_size):
                sp_size, pp_size = stage_size // tp_size, world_size // stage_size
                if MODEL.num_heads % tp_size == 0 and (stage_size == 1 or world_size <= num_devices):
                    for kind in kinds(tp_size, sp_size):
                        for passes, order in visits(pp_size):
                            yield Parallel(
                                tp_size=tp_size, sp_size=sp_size, sp_kind=kind, pp_size=pp_size,
                                virtual_stages=passes, stage_order=order,
                                layer_partition=even_partition(MODEL.num_layers, pp_size * passes),
                            )  # fmt: skip


def visits(pp_size: int) -> list[tuple[int, StageOrder]]:
    """How often rounds visit a stage, and in which order."""
    if pp_size == 1:
        return [(1, StageOrder.LOOP)]
    return [(1, StageOrder.LOOP), (2, StageOrder.LOOP), (2, StageOrder.V)]


def divisors(number: int) -> list[int]:
    """All divisors."""
    return [size for size in range(1, number + 1) if number % size == 0]


def kinds(tp_size: int, sp_size: int) -> list[SPKind]:
    """Kinds of sequence parallelism that take so many ranks."""
    if sp_size > 1:
        return [SPKind.GATHER, SPKind.ULYSSES, SPKind.RING]
    return [SPKind.NONE, SPKind.MEGATRON] if tp_size > 1 else [SPKind.NONE]


def make_job(folder: Path, shape: ModelShape, parallel: Parallel, number: int, device: torch.device) -> RunJob:
    """The plan with this number: chunks of uneven length, now one and now several requests a round."""
    draw = random.Random(number)
    source = random.Random(0)
    prompts = tuple(tuple(source.choices(range(shape.vocab_size), k=length)) for length in LENGTHS)
    rounds: list[Round] = []
    starts = dict.fromkeys(range(len(LENGTHS)), 0)
    while starts:
        chunks = []
        for request in draw.sample(sorted(starts), k=draw.randint(1, len(starts))):
            tokens = min(draw.choice([1, 37, 64, 100, 300]), LENGTHS[request] - starts[request])
            chunks.append(Chunk(request, starts[request], tokens))
            starts[request] += tokens
        starts = {request: start for request, start in starts.items() if start < LENGTHS[request]}
        rounds.append(tuple(chunks))
    cuts = CUTS[parallel.sp_kind]
    return RunJob(
        shape=shape,
        parallel=parallel,
        requests=tuple(Request(id=f"r{index}", prompt_tokens=length) for index, length in enumerate(LENGTHS)),
        rounds=tuple(rounds),
        cuts=tuple(cuts[(number + index) % len(cuts)] for index in range(len(rounds))),
        window=[None, *range(1, parallel.pp_size + 2)][number % (parallel.pp_size + 2)],
        prompts=prompts,
        weights=folder,
        dtype="float32",
        max_new_tokens=NEW_TOKENS,
        repeat=2,
        kernels=AttentionKernels(usual=available_kernels(device, torch.float32)[0]),
    )


def main() -> None:
    """Run all layouts and print one line each as it ends; exit code 1 if any token is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, help="[default: the cards, or four on a CPU]")
    parser.add_argument("--times", type=int, default=20, help="plans of each launch")
    parser.add_argument("--launches", type=int, default=1, help="launches of each layout")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    num_devices = torch.cuda.device_count() if options.device == "cuda" else 64
    rows: list[list[object]] = []
    with TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_demo_model(folder, MODEL)
        shape = load_model_shape(str(folder))
        expected: dict[str, tuple[int, ...]] | None = None
        for parallel in layouts(options.ranks or min(num_devices, 4), num_devices):
            jobs = [make_job(folder, shape, parallel, number, device) for number in range(options.times)]
            wrong, started = 0, time.monotonic()
            for _ in range(options.launches):
                reports = run_ranks(
                    run_jobs, jobs, world_size=parallel.world_size, device_type=options.device, num_threads=1,
                    stall_timeout_s=STALL_S,
                )  # fmt: skip
                for job, of_job in zip(jobs, zip(*reports, strict=True), strict=True):
                    ids = next(report.token_ids for report in of_job if report.token_ids is not None)
                    found = {request.id: tokens for request, tokens in zip(job.requests, ids, strict=True)}
                    if expected is None:
                        outcomes = [
                            RequestResult(id=key, token_ids=tokens, ttft_s=0.0) for key, tokens in found.items()
                        ]
                        checks = check_tokens(
                            outcomes, job.prompts, folder, dtype="float32", max_new_tokens=NEW_TOKENS,
                            end_ids=frozenset(), device_type=options.device,
                        )  # fmt: skip
                        assert all(check.equal for check in checks), "the very first tokens differ from Transformers'"
                        expected = found
                    wrong += found != expected
            taken_s = time.monotonic() - started
            rows.append([str(layout_of(parallel)), parallel.world_size, options.launches * options.times, wrong,
                         taken_s / options.launches])  # fmt: skip
            print(*rows[-1], flush=True)
    where = torch.cuda.get_device_name(0) if options.device == "cuda" else "CPU"
    print_table(
        ["layout", "ranks", "plans", "with wrong tokens", "s a launch"],
        rows,
        title=f"{options.launches} x {options.times} plans in a row on {min(num_devices, 64)} x {where}",
    )
    sys.exit(any(row[3] for row in rows))


if __name__ == "__main__":
    main()

"""Tokens and logits on cards against Transformers: layouts of every kind, on a checkpoint written on the spot.

    python -m benchmarks.gpu_equality [--device cpu] [--small] [--world-sizes 1,2,4]

In float32 the tokens must equal those of `generate`. In bfloat16 random weights flip near ties, so logits are compared:
the teacher-forced logits at the end of each prompt against Transformers' full forward, beside the largest difference
that Transformers' own chunked forwards show to its full one, and that of its full forward with plain ("eager")
attention, another kernel that computes the same; and all of them against Transformers in float32.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.demo_model import SMALL, DemoSize, write_demo_model
from profiler.comm.links.group import make_groups
from profiler.comm.ranks.launch import run_ranks
from profiler.comm.ranks.rank import RankContext
from profiler.kernels.attention import available_kernels
from profiler.model import PRECISIONS, load_model_shape
from profiler.sequence.kind import SPKind
from runtime.job.job import RankReport, RunJob
from runtime.job.place import Place, mesh_of
from runtime.run.clock import make_clock
from runtime.run.pipeline import Pipeline
from runtime.run.rank import run_jobs
from runtime.run.reference import check_tokens
from runtime.run.result import RequestResult
from runtime.stage.stage import KernelStage
from service.cli.output import print_table
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.plan import Chunk, Parallel, Request, Round

LENGTHS = (1500, 700, 1100, 333)
CHUNK = 400
THEIR_CHUNKS = (128, 256, CHUNK)  # Transformers' own difference depends on where it cuts: the largest is shown
NEW_TOKENS = 8
# With SMALL a card's library took the same kernels for a chunk's rows as for a whole prompt's.
SIZES = {
    "cuda": DemoSize(hidden_size=2048, intermediate_size=8192, num_layers=4, num_heads=16, num_kv_heads=4),
    "cpu": SMALL,
}
# By the number of ranks: what `Parallel` is told beside the layers.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "PP2": {"pp_size": 2},
        "PP2 in two groups": {"pp_size": 2, "virtual_stages": 2},
        "TP2": {"tp_size": 2},
        "TP2 Megatron": {"tp_size": 2, "sp_kind": SPKind.MEGATRON},
        "SP2 gather": {"sp_size": 2, "sp_kind": SPKind.GATHER},
        "SP2 Ulysses": {"sp_size": 2, "sp_kind": SPKind.ULYSSES},
        "SP2 ring": {"sp_size": 2, "sp_kind": SPKind.RING},
    },
    4: {
        "PP4": {"pp_size": 4},
        "TP4": {"tp_size": 4},
        "PP2 TP2 Megatron": {"pp_size": 2, "tp_size": 2, "sp_kind": SPKind.MEGATRON},
        "TP2 SP2 gather": {"tp_size": 2, "sp_size": 2, "sp_kind": SPKind.GATHER},
        "PP2 SP2 gather": {"pp_size": 2, "sp_size": 2, "sp_kind": SPKind.GATHER},
        "SP4 gather": {"sp_size": 4, "sp_kind": SPKind.GATHER},
        "SP4 Ulysses": {"sp_size": 4, "sp_kind": SPKind.ULYSSES},
        "SP4 ring": {"sp_size": 4, "sp_kind": SPKind.RING},
    },
}


class LogitStage(KernelStage):
    """Keeps the logits that tokens are chosen by."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits: dict[int, torch.Tensor] = {}

    def next_ids(self, hidden: torch.Tensor) -> torch.Tensor:
        """Choose as a stage does, and keep."""
        assert self.shard.head is not None
        for row in range(hidden.shape[0]):
            self.logits[len(self.logits)] = self.shard.head.local_logits(hidden[row : row + 1]).float().cpu()
        return super().next_ids(hidden)


@torch.inference_mode()
def logits_of(context: RankContext, jobs: Sequence[RunJob]) -> list[list[torch.Tensor]]:
    """The logits at the end of each prompt, in the order in which the prompts end; [] on ranks without a head."""
    kept = []
    for job in jobs:
        place = Place.of(context.rank, job.parallel)
        with make_groups(mesh_of(job.parallel), context.rank, context.device) as groups:
            stage = LogitStage(job, place, groups, context.device)
            clock = make_clock(context.device)
            clock.begin()
            Pipeline(job, place, groups, stage, clock, context.progress).prefill()
            kept.append(list(stage.logits.values()))
    return kept


def tokens_and_logits(
    context: RankContext, exact: Sequence[RunJob], rough: Sequence[RunJob]
) -> tuple[list[RankReport], list[list[torch.Tensor]]]:
    """Tokens of the jobs in float32 and logits of those in bfloat16, on the same ranks."""
    return run_jobs(context, exact), logits_of(context, rough)


def tokens_equal(job: RunJob, reports: Sequence[RankReport], device_type: str) -> bool:
    """Whether all new tokens are those of `generate`."""
    assert job.weights is not None
    ids = next(report.token_ids for report in reports if report.token_ids is not None)
    outcomes = [RequestResult(id=r.id, token_ids=i, ttft_s=0.0) for r, i in zip(job.requests, ids, strict=True)]
    checks = check_tokens(
        outcomes, job.prompts, job.weights, dtype=job.dtype, max_new_tokens=job.max_new_tokens, end_ids=frozenset(),
        device_type=device_type,
    )  # fmt: skip
    return all(check.equal for check in checks)


def make_parallel(num_layers: int, layout: Mapping[str, Any]) -> Parallel:
    """A layout with its layers in shares as even as can be."""
    groups = layout.get("pp_size", 1) * layout.get("virtual_stages", 1)
    base, rest = divmod(num_layers, groups)
    partition = tuple(base + (group < rest) for group in range(groups))
    return replace(Parallel(tp_size=1, pp_size=groups, layer_partition=partition), **({"pp_size": 1} | dict(layout)))


def make_job(folder: Path, layout: Mapping[str, Any], dtype: str, device: torch.device) -> RunJob:
    """All prompts in chunks of CHUNK tokens, two requests a round where they go on together."""
    shape = load_model_shape(str(folder))
    source = random.Random(1)
    prompts = tuple(tuple(source.choices(range(shape.vocab_size), k=length)) for length in LENGTHS)
    rounds: list[Round] = []
    for first, second in ((0, 1), (2, 3)):
        for start in range(0, max(LENGTHS[first], LENGTHS[second]), CHUNK):
            chunks = [
                Chunk(index, start, min(CHUNK, LENGTHS[index] - start))
                for index in (first, second)
                if start < LENGTHS[index]
            ]
            rounds.append(tuple(chunks))
    return RunJob(
        shape=shape,
        parallel=make_parallel(shape.num_layers, layout),
        requests=tuple(Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(LENGTHS)),
        rounds=tuple(rounds),
        window=None,
        prompts=prompts,
        weights=folder,
        dtype=dtype,
        max_new_tokens=1,
        repeat=1,
        kernels=AttentionKernels(usual=available_kernels(device, PRECISIONS[dtype].activations.torch_dtype)[0]),
    )


def end_order(job: RunJob) -> list[int]:
    """Requests in the order in which their prompts end."""
    return [
        chunk.request
        for chunks in job.rounds
        for chunk in chunks
        if chunk.end == job.requests[chunk.request].prompt_tokens
    ]


@torch.inference_mode()
def transformers_logits(
    job: RunJob, device: torch.device, *, chunk: int | None = None, attention: str = "sdpa"
) -> list[torch.Tensor]:
    """Logits of the last prompt token, [V] float32: one forward, or forwards of `chunk` tokens over a cache."""
    from transformers import AutoModelForCausalLM

    assert job.weights is not None
    model = AutoModelForCausalLM.from_pretrained(
        job.weights, dtype=PRECISIONS[job.dtype].weights.torch_dtype, attn_implementation=attention
    )
    model = model.to(device).eval()
    logits = []
    for prompt in job.prompts:
        ids = torch.tensor([prompt], device=device)
        cache = None
        for start in range(0, len(prompt), chunk or len(prompt)):
            part = ids[:, start : start + (chunk or len(prompt))]
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        logits.append(out.logits[0, -1].float().cpu())
    return logits


def difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The largest |left - right| / |right| over the prompts."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True))


def main() -> None:
    """Run all layouts and print what equals what."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="take the model for a CPU")
    parser.add_argument("--world-sizes", default="1,2", help="numbers of ranks, after commas")
    options = parser.parse_args()
    device_type = options.device
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    rows: list[tuple[object, ...]] = []
    with TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_demo_model(folder, SIZES["cpu" if options.small else device_type])
        theirs = make_job(folder, LAYOUTS[1]["one"], "bfloat16", device)
        full, eager = (transformers_logits(theirs, device, attention=kernel) for kernel in ("sdpa", "eager"))
        exactly = transformers_logits(replace(theirs, dtype="float32"), device)
        chunked = [transformers_logits(theirs, device, chunk=chunk) for chunk in THEIR_CHUNKS]
        rows.append(("Transformers, whole prompts", None, None, difference(full, exactly)))
        rows.append(("Transformers, eager attention", None, difference(eager, full), difference(eager, exactly)))
        rows.append((
            "Transformers, chunks", None, *(max(difference(one, to) for one in chunked) for to in (full, exactly))
        ))  # fmt: skip
        for ranks in map(int, options.world_sizes.split(",")):
            layouts = LAYOUTS[ranks]
            exact, rough = (
                [make_job(folder, layout, dtype, device) for layout in layouts.values()]
                for dtype in ("float32", "bfloat16")
            )
            exact = [replace(job, max_new_tokens=NEW_TOKENS) for job in exact]
            found = run_ranks(tokens_and_logits, exact, rough, world_size=ranks, device_type=device_type, num_threads=1)
            for index, layout in enumerate(layouts):
                equal = tokens_equal(exact[index], [reports[index] for reports, _ in found], device_type)
                job = rough[index]
                # Ranks that share rows all keep the logits; those of a tensor-parallel group have a slice each.
                slices = [kept[index] for _, kept in found if kept[index]][: job.parallel.tp_size]
                joined = [torch.cat(parts, dim=-1)[0] for parts in zip(*slices, strict=True)]
                ours = [joined[end_order(job).index(request)] for request in range(len(LENGTHS))]
                rows.append((layout, equal, difference(ours, full), difference(ours, exactly)))
    print_table(
        ("layout", "float32 tokens equal", "bfloat16 logits to whole", "to float32"),
        rows,
        title=f"{len(LENGTHS)} prompts of {LENGTHS} tokens against Transformers on {device_type}",
    )


if __name__ == "__main__":
    main()

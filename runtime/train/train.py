"""Trains a model as a plan lays it out: checks everything, starts the ranks, and leaves a checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from db.errors import UserError
from profiler.comm.ranks.launch import is_first_process, run_ranks
from profiler.hardware.datasheet import published_peak_flops
from profiler.hardware.device import describe_hardware
from profiler.model import ModelShape, load_model_shape, precision_of
from profiler.model.flops import prefill_flops
from profiler.sequence.kind import SPKind
from runtime.run.preparation import check_layout, model_shape
from runtime.run.prompts import TokenIds
from runtime.train.data import TokenStream
from runtime.train.rank import StepRecord, Teacher, TrainJob, train_rank
from runtime.train.recipe import TrainingRecipe
from runtime.train.saving import latest, read_notes, take_model
from runtime.weights.quantized import check_checkpoint
from tuner.plan.plan import Parallel, Plan

STALL_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """A training: every step, those before it was resumed too."""

    records: tuple[StepRecord, ...]
    tokens_a_step: int
    seconds_a_step: float  # median of this run, its first step left out where there are more
    tokens_a_s: float
    rank_flops: float  # FLOP/s of a rank: 6ND and attention, forward and backward
    mfu: float | None  # that against the card's published peak
    skipped_steps: int
    resumed_at: int
    reserved_bytes: int | None
    allocated_bytes: int | None
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """All but the steps, for programs."""
        names = (
            "tokens_a_step",
            "seconds_a_step",
            "tokens_a_s",
            "rank_flops",
            "mfu",
            "skipped_steps",
            "resumed_at",
            "reserved_bytes",
        )
        found = {name: getattr(self, name) for name in names}
        last = self.records[-1]
        return found | {
            "steps": len(self.records), "loss": last.loss, "cross_entropy": last.cross_entropy,
            "first_loss": self.records[0].loss, "folder": str(self.folder),
        }  # fmt: skip


def train(
    plan: Plan,
    recipe: TrainingRecipe,
    *,
    weights: Path | None,
    sequences: Sequence[TokenIds],
    output: Path | None,
    state: Path | None = None,
    teacher: Path | None = None,
    device_type: str = "cpu",
    num_threads: int = 1,
    until_step: int | None = None,
    logs: bool = False,
    stall_timeout_s: float = STALL_LIMIT_S,
) -> TrainResult:
    """Train the checkpoint at `weights` on the tokens of `sequences`, and write the result to the folder `output`.

    Each request of the plan is a sequence of a step. state: where checkpoints lie on the way (default `OUTPUT.state`);
    if there is one of the same training, it goes on from there. Raises `UserError` before any rank starts for whatever
    does not fit together, and `RanksFailedError` when a rank dies, raises or stalls. Without output nothing is saved;
    without weights they are random: both for measurements.
    """
    shape = model_shape(plan.model, weights)
    check_trainable(plan, shape, weights, device_type=device_type)
    if weights is None and output is not None:
        raise UserError("--weights", "", "must be a folder with a checkpoint")
    if output is not None and output.exists():
        raise UserError("--output", output, "exists already: name a folder that does not")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError("--output", output, "must be in a folder that exists")
    state = state or (output.with_name(f"{output.name}.state") if output is not None else Path("none"))
    resume = latest(state) if output is not None else None
    if resume is not None:
        _check_resumable(resume, recipe, plan.parallel)
    resumed_at = 0 if resume is None else int(read_notes(resume)["step"])
    job = TrainJob(
        shape=shape,
        weights=weights,
        parallel=plan.parallel,
        requests=plan.requests,
        rounds=plan.rounds,
        recipe=recipe,
        stream=TokenStream.of(sequences, plan.requests, seed=recipe.seed),
        state=state.absolute(),
        resume=resume,
        teacher=_teacher(teacher, shape, plan.parallel) if teacher is not None else None,
        until_step=until_step,
        logs=logs,
        saves=output is not None,
    )
    reports = run_ranks(
        train_rank, job, world_size=plan.parallel.world_size, device_type=device_type, num_threads=num_threads,
        stall_timeout_s=stall_timeout_s,
    )  # fmt: skip
    first = reports[0]
    is_done = len(first.records) == recipe.steps
    if output is not None and is_done and first.folder is not None and is_first_process():
        take_model(first.folder, output.absolute())
    return _result(job, first.records, reports, resumed_at, output if is_done and output else state, device_type)


def check_trainable(plan: Plan, shape: ModelShape, weights: Path | None, *, device_type: str) -> None:
    """Raise `UserError` for a plan or a model that training does not take."""
    parallel = plan.parallel
    check_layout(plan, shape, max_new_tokens=1, device_type=device_type)
    shape.check_as_stored("model", "trained")
    if shape.quantization is not None:
        raise UserError("--weights", weights, "is quantized: train the checkpoint that it was made from")
    if weights is not None:
        check_checkpoint(weights, shape, precision_of(shape.dtype))
    if parallel.sp_kind is not SPKind.NONE:
        raise UserError("parallel.sp_kind", parallel.sp_kind, "none in training: cut long sequences into chunks")
    if parallel.virtual_stages > 1:
        raise UserError("parallel.virtual_stages", parallel.virtual_stages, "1 in training")
    for layer in shape.layer_kinds:
        kv_heads = layer.attention.kv_heads.count
        if kv_heads % parallel.tp_size:
            allowed = f"must divide num_key_value_heads = {kv_heads} in training"
            raise UserError("parallel.tp_size", parallel.tp_size, allowed)
    for index, request in enumerate(plan.requests):
        if request.cached_tokens:
            raise UserError(f"requests[{index}].cached_tokens", request.cached_tokens, "0 in training")
        if request.prompt_tokens < 2:
            raise UserError(f"requests[{index}].prompt_tokens", request.prompt_tokens, "at least 2 in training")


def _teacher(folder: Path, shape: ModelShape, parallel: Parallel) -> Teacher:
    if not (folder / "config.json").is_file():
        raise UserError("--teacher", folder, "must be a folder with a config.json and safetensors")
    found = load_model_shape(str(folder))
    if found.vocab_size != shape.vocab_size:
        raise UserError("--teacher", folder, f"must have a vocabulary of {shape.vocab_size}, not {found.vocab_size}")
    if found.quantization is not None:
        raise UserError("--teacher", folder, "is quantized: take the checkpoint that it was made from")
    found.check_tp_size(parallel.tp_size)
    check_checkpoint(folder, found, precision_of(found.dtype))
    partition = parallel.layer_partition
    if found.num_layers != shape.num_layers:
        if found.num_layers < parallel.pp_size:
            raise UserError("--teacher", folder, f"must have at least {parallel.pp_size} layers, one a stage")
        ends = [found.num_layers * (stage + 1) // parallel.pp_size for stage in range(parallel.pp_size)]
        partition = tuple(end - start for start, end in zip((0, *ends), ends, strict=False))
    return Teacher(shape=found, weights=folder, parallel=replace(parallel, layer_partition=partition))


def _check_resumable(folder: Path, recipe: TrainingRecipe, parallel: Parallel) -> None:
    notes = read_notes(folder)
    changed = recipe.differs(notes["recipe"])
    if changed is not None:
        was = notes["recipe"].get(changed)
        raise UserError(changed, getattr(recipe, changed), f"{was}, as the training in {folder.parent} began")
    if parallel.to_json() != notes["layout"]:
        raise UserError("parallel", folder.parent, "must be the layout that the training there began with")


def _result(
    job: TrainJob, records: Sequence[StepRecord], reports: Sequence[Any], resumed_at: int, folder: Path, device: str
) -> TrainResult:
    tokens = job.recipe.accumulate * sum(request.prompt_tokens for request in job.requests)
    mine = records[resumed_at:] or records
    timed = mine[1:] or mine
    tokens_a_s = tokens * len(timed) / sum(record.seconds for record in timed)
    peak = published_peak_flops(describe_hardware(device, num_threads=1).device, job.recipe.formats.activations.name)
    rate = train_flops(job) / tokens * tokens_a_s / job.parallel.world_size

    def most(name: str) -> int | None:
        found = [getattr(report, name) for report in reports if getattr(report, name) is not None]
        return max(found, default=None)

    return TrainResult(
        records=tuple(records),
        tokens_a_step=tokens,
        seconds_a_step=statistics.median(record.seconds for record in timed),
        tokens_a_s=tokens_a_s,
        rank_flops=rate,
        mfu=rate / peak if peak else None,
        skipped_steps=sum(record.is_skipped for record in records),
        resumed_at=resumed_at,
        reserved_bytes=most("reserved_bytes"),
        allocated_bytes=most("allocated_bytes"),
        folder=folder,
    )


def train_flops(job: TrainJob) -> float:
    """FLOPs of a step: three times those of its forward, what is computed again not counted (PaLM, appendix B)."""
    chunks = [(chunk.tokens, chunk.start) for chunks in job.rounds for chunk in chunks]
    return 3.0 * job.recipe.accumulate * prefill_flops(job.shape, chunks, job.num_targets // job.recipe.accumulate)

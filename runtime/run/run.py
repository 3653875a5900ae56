"""Runs a plan: checks it, starts the ranks, and stores the plan, its prediction and the measured times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from sqlalchemy.orm import Session

from db.errors import UserError
from db.rows.hardware import Hardware, save_hardware
from db.rows.measurements import Measurement, load_measurements
from db.rows.plans import save_plan_row
from db.rows.processes import process_row
from db.rows.runs import RunKind, RunOutcome, fail_run, finish_run, start_run
from db.store.engine import Database, open_database
from profiler.comm.ranks.failure import RanksFailedError
from profiler.comm.ranks.launch import is_first_process, run_ranks
from profiler.comm.ranks.stall import LEAST_LIMIT_S
from profiler.hardware.device import describe_hardware
from profiler.kernels.quantized.support import check_precision
from profiler.model import PRECISIONS, Backend, ModelShape, precision_of
from profiler.model.flops import fastest_product_flops, prefill_flops
from runtime.job.job import RankReport, RunJob
from runtime.job.probe import find_probe
from runtime.run.prediction import Prediction, read_prediction
from runtime.run.preparation import (
    attention_kernels,
    check_counts,
    check_layout,
    checked_prompts,
    missing_kernels,
    model_shape,
    with_dtype,
)
from runtime.run.prompts import random_prompts
from runtime.run.rank import run_jobs
from runtime.run.result import RunResult, make_result
from runtime.weights.generation import end_ids
from runtime.weights.quantized import check_checkpoint
from tuner.plan.memory import check_memory
from tuner.plan.plan import Plan
from tuner.waterfall.steps import waterfalls

# A card that rested starts at a clock that it cannot hold: a round took up to a fifth longer 0.2 s later, and some
# 0.8 s after the start the card corrects itself by a quarter of a second at its lowest clock.
SETTLE_S = {"cpu": 0.0, "cuda": 1.0}
SETTLES_ITSELF_S = 2.5  # in a plan that long the start is lost
STALL_FACTOR = 20.0
UNPREDICTED_LIMIT_S = 600.0
Conclude = Callable[[RunResult], Callable[[Session], None]]
"""Draws a conclusion from a result; what it returns writes that in the transaction that keeps the result."""


class RunOptions(TypedDict, total=False):
    """The options of `run_plans`."""

    weights: Path | None
    random_weights: bool
    prompts: Sequence[Sequence[int]] | None
    max_new_tokens: int
    repeat: int
    device_type: str
    num_threads: int
    dtype: str | None
    db_url: str | None
    kind: RunKind | str
    study: str | None
    stall_timeout_s: float | None
    conclude: Conclude | None


def run_plan(plan: Plan, **options: Unpack[RunOptions]) -> RunResult:
    """`run_plans` for one plan."""
    (result,) = run_plans([plan], **options)
    return result


def run_plans(
    plans: Sequence[Plan],
    *,
    weights: Path | None = None,
    random_weights: bool = False,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 1,
    repeat: int = 1,
    device_type: str = "cpu",
    num_threads: int = 1,
    dtype: str | None = None,
    db_url: str | None = None,
    kind: RunKind | str = RunKind.RUN_PLAN,
    study: str | None = None,
    stall_timeout_s: float | None = None,
    conclude: Conclude | None = None,
) -> list[RunResult]:
    """Execute the rounds of plans of as many ranks, one after another on the same ones, each then decoding greedily.

    weights: a Hugging Face checkpoint, or None with `random_weights`. prompts: token ids of each request, of every
    plan, in the plans' order; random ids of the planned lengths if None. repeat: passes over the rounds.

    stall_timeout_s: the run fails when no rank moved for so long; None is a minute, or more for long rounds.
    conclude: called with each result before it is kept; where it raises, the run failed.

    Raises `UserError` before any rank starts for whatever does not fit together, and `RanksFailedError` when a rank
    dies, raises or stalls; the rows of plans that had ended by then keep their results, those of the others say failed.
    Under torchrun each rank calls this and gets the results; the first writes the rows.
    """
    check_counts(max_new_tokens=max_new_tokens, repeat=repeat, num_threads=num_threads)
    if (weights is None) != random_weights:
        raise UserError("--weights", weights or "", "give either a folder of weights or --random-weights")
    plans = [with_dtype(plan, dtype) for plan in plans]
    sizes = {plan.parallel.world_size for plan in plans}
    if len(sizes) != 1:
        raise UserError("plans", f"{sorted(sizes)} ranks", "must be one or more plans of as many ranks")
    hardware = describe_hardware(device_type, num_threads=num_threads)
    ends = end_ids(weights)
    with ExitStack() as stack:
        database = stack.enter_context(open_database(db_url))
        rows = load_measurements(database, hardware)
        jobs = [
            make_job(
                plan, hardware, rows, weights=weights, prompts=prompts, max_new_tokens=max_new_tokens, repeat=repeat,
                device_type=device_type,
            )
            for plan in plans
        ]  # fmt: skip
        predictions = [read_prediction(plan) for plan in plans]
        process_id = stack.enter_context(process_row(database, str(kind))) if is_first_process() else None
        records = [
            stack.enter_context(Record(
                database, plan, hardware, kind=kind, study=study, job=job, prediction=prediction, index=index,
                process_id=process_id,
            ))
            for index, (plan, job, prediction) in enumerate(zip(plans, jobs, predictions, strict=True))
        ]  # fmt: skip
        try:
            reports = run_ranks(
                run_jobs,
                jobs,
                world_size=plans[0].parallel.world_size,
                device_type=device_type,
                num_threads=num_threads,
                stall_timeout_s=stall_timeout_s or max(map(stall_limit_s, plans)),
            )
        except RanksFailedError as error:
            keep_results(records, error.reports.values(), rows, ends, conclude)
            raise
        return keep_results(records, reports, rows, ends, conclude)


def keep_results(
    records: Sequence[Record],
    reports: Iterable[Sequence[RankReport]],
    rows: Sequence[Measurement],
    ends: frozenset[int],
    conclude: Conclude | None = None,
) -> list[RunResult]:
    """Keep the results of the plans, in order, that all ranks have reported; reports: of each rank."""
    results = []
    for record, of_ranks in zip(records, zip(*reports, strict=False), strict=False):
        result = make_result(record.job, of_ranks, prediction=record.prediction, end_ids=ends)
        result = with_mfu(result, record.plan, record.job.shape, record.hardware, rows)
        results.append(record.finish(result, conclude))
    return results


def stall_limit_s(plan: Plan) -> float:
    """Seconds without any progress after which a run of the plan counts as stalled, where nobody said.

    Generous: a minute at least, and many times what its longest round is predicted to take. A plan without a prediction
    may have rounds of any length.
    """
    if plan.predicted is None:
        return UNPREDICTED_LIMIT_S
    rounds_s = (seconds for row in plan.predicted.round_s or () for seconds in row)
    longest_s = max(rounds_s, default=plan.predicted.makespan_s)
    return max(LEAST_LIMIT_S, STALL_FACTOR * longest_s)


def make_job(
    plan: Plan,
    hardware: Hardware,
    rows: Sequence[Measurement],
    *,
    device_type: str,
    weights: Path | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 1,
    repeat: int = 1,
) -> RunJob:
    """The job of the ranks, checked against the model, the weights, the prompts and the machine.

    weights: None for random ones; prompts: None for random ids. Raises `UserError` for what does not fit together.
    """
    shape = model_shape(plan.model, weights)
    check_layout(plan, shape, max_new_tokens=max_new_tokens, device_type=device_type)
    check_precision(precision_of(plan.precision), device_type, field="precision")
    if weights is not None:
        if shape.unread is not None:
            raise UserError("weights", shape.weight_format, f"cannot be run as they are: {shape.unread}")
        if shape.backend is Backend.OWN:  # Transformers checks what it reads
            check_checkpoint(weights, shape, precision_of(plan.precision))
    token_ids = checked_prompts(
        random_prompts(plan.requests, shape.vocab_size) if prompts is None else prompts, plan, shape.vocab_size
    )
    check_memory(
        shape, plan, max_new_tokens=max_new_tokens, device_type=device_type, memory_bytes=hardware.memory_bytes
    )
    return RunJob(
        shape=shape,
        parallel=plan.parallel,
        requests=plan.requests,
        rounds=plan.rounds,
        cuts=plan.cuts,
        window=plan.window,
        prompts=token_ids,
        weights=weights,
        dtype=plan.precision,
        max_new_tokens=max_new_tokens,
        repeat=repeat,
        kernels=attention_kernels(plan, device_type),
        probe=find_probe(rows, dtype=PRECISIONS[plan.precision].activations.name, world_size=plan.parallel.world_size),
        settle_s=_settle_s(plan, device_type),
    )


class Record:
    """A run's row in the database: running, then done, or failed with where and why; `index` among the launch's."""

    def __init__(
        self,
        database: Database,
        plan: Plan,
        hardware: Hardware,
        *,
        kind: RunKind | str,
        study: str | None,
        job: RunJob,
        prediction: Prediction,
        index: int,
        process_id: int | None,
    ) -> None:
        self.database, self.index = database, index
        self.plan, self.job, self.hardware, self.prediction = plan, job, hardware, prediction
        self.run_id: int | None = None
        if not is_first_process():
            return
        details = {
            "weights": job.weights.name if job.weights else "random",
            "dtype": job.dtype,
            "max_new_tokens": job.max_new_tokens,
            "repeat": job.repeat,
            "settle_s": job.settle_s,
        }
        if missing := missing_kernels(plan, job.kernels):
            details["missing_kernels"] = list(missing)
        plan_id = save_plan_row(database, plan.to_json(), hardware_id=save_hardware(database, hardware))
        self.run_id = start_run(
            database, plan_id, hardware, kind=kind, study=study, details=details, process_id=process_id
        )

    def finish(self, result: RunResult, conclude: Conclude | None = None) -> RunResult:
        """Keep the outcome, all of it at once."""
        if self.run_id is None:
            return result
        result = replace(result, run_id=self.run_id)
        outcome = RunOutcome(
            makespan_s=result.makespan_s,
            predicted_makespan_s=result.predicted_makespan_s,
            slowdown=result.slowdown,
            mfu=result.mfu if result.mfu is not None else result.mfu_of_ceiling,
            ttft_s=[request.ttft_s for request in result.requests],
            rounds=result.rounds,
        )
        finish_run(self.database, self.run_id, outcome, also=conclude and conclude(result))
        return result

    def __enter__(self) -> Record:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is None or self.run_id is None:
            return
        if isinstance(error, RanksFailedError):
            failure = error.failure
            if failure.job < self.index:
                fail_run(self.database, self.run_id, f"not begun: plan {failure.job + 1} of the launch failed")
                return
            place = {"rank": failure.rank, "stage": failure.stage, "round_index": failure.round_index}
            fail_run(self.database, self.run_id, failure.error, **place)
        else:
            fail_run(self.database, self.run_id, f"{type(error).__name__}: {error}".removesuffix(": "))


def with_mfu(
    result: RunResult, plan: Plan, shape: ModelShape, hardware: Hardware, rows: Iterable[Measurement]
) -> RunResult:
    """Add the model FLOPs utilisation: all devices and all bubbles are in the denominator."""
    chunks = ((chunk.tokens, chunk.start) for chunks in plan.rounds for chunk in chunks)
    rate = prefill_flops(shape, chunks, len(plan.requests)) / result.makespan_s / plan.parallel.world_size
    peak = PRECISIONS[plan.precision].peak_flops(hardware.device)
    fastest = fastest_product_flops(rows, plan.precision)
    # A run that is faster than what was measured on a busy machine shows itself how fast products are.
    of_ceiling = min(1.0, rate / fastest) if fastest else None
    result = replace(result, mfu=rate / peak if peak else None, mfu_of_ceiling=of_ceiling)
    return with_waterfalls(result, plan, shape, peak or max(fastest or 0.0, rate))


def with_waterfalls(result: RunResult, plan: Plan, shape: ModelShape, peak_flops: float) -> RunResult:
    """Add the way from the peak of the ranks to the makespan, predicted and measured, where a peak is known."""
    moves = plan.predicted.moves if plan.predicted else ()
    if not peak_flops:
        return replace(result, moves=moves)
    planned, measured = waterfalls(
        plan,
        shape,
        result.rounds,
        result.makespan_s,
        result.predicted_makespan_s,
        peak_flops=peak_flops,
        slowdown=result.slowdown or 1.0,
    )
    return replace(result, moves=moves, planned_waterfall=planned, waterfall=measured)


def _settle_s(plan: Plan, device_type: str) -> float:
    """Seconds of passes that do not count; none where they would have to wait for arrivals."""
    long = plan.predicted is not None and plan.predicted.makespan_s > SETTLES_ITSELF_S
    arrives = any(request.arrival_s > 0.0 for request in plan.requests)
    return 0.0 if long or arrives else SETTLE_S[device_type]

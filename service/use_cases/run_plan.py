"""What `isochunk run-plan` does around a run: prompts from a file, the check, the files written, the tables printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from sqlalchemy.orm import Session

from db.errors import UserError
from db.files.documents import write_json
from db.files.replacement import check_writable, replace_file
from db.rows.job_ends import JobOutcome, add_end
from profiler.comm.ranks.launch import is_first_process
from profiler.hardware.device import check_device_type, default_num_threads
from runtime.run.preparation import (
    attention_kernels,
    check_counts,
    check_layout,
    missing_kernels,
    model_shape,
    with_dtype,
)
from runtime.run.prompts import TokenIds, Tokenizer, random_prompts, read_prompts
from runtime.run.reference import TokenCheck, check_tokens
from runtime.run.result import RunResult
from runtime.run.run import run_plan
from runtime.run.trace import write_trace
from runtime.weights.generation import end_ids
from service.reasons.waterfall_chart import drawing
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan, load_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """The options of the command."""

    plan: Path
    weights: Path | None
    random_weights: bool
    prompts: Path | None
    max_new_tokens: int
    check: bool
    trace: Path | None
    output: Path | None
    plot: Path | None
    repeat: int
    device_type: str
    threads_per_rank: int | None
    dtype: str | None
    db_url: str | None
    stall_timeout_s: float | None = None
    job: str | None = None
    """The job of the service that this is: it ends where its result is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run with what was made of it."""

    plan: Plan
    result: RunResult
    texts: tuple[str, ...] | None  # the new tokens as text, when the prompts were text
    checks: tuple[TokenCheck, ...] | None

    @property
    def tokens_equal(self) -> bool | None:
        """Whether all tokens equal those of Transformers; None when it was not checked."""
        return None if self.checks is None else all(check.equal for check in self.checks)

    @property
    def exit_code(self) -> int:
        """Of the command: 1 where tokens differ."""
        return int(self.tokens_equal is False)

    def to_json(self) -> dict[str, Any]:
        """The content of `--output`."""
        out = self.result.to_json()
        for entry, text in zip(out["requests"], self.texts or (), strict=False):
            entry["text"] = text
        for entry, check in zip(out["requests"], self.checks or (), strict=False):
            entry["tokens_equal"] = check.equal
            if not check.equal:
                entry |= {"first_mismatch": check.first_mismatch, "top2_margin": check.top2_margin}
        return out


def execute(request: RunRequest) -> Run:
    """Read, run and check. Raises `UserError` and `RanksFailedError`."""
    _check_writable(request)
    plan = with_dtype(load_plan(request.plan), request.dtype)
    num_threads = plan.threads_per_rank if request.threads_per_rank is None else request.threads_per_rank
    if num_threads is None:
        num_threads = default_num_threads(request.device_type, plan.parallel.world_size)
    check_counts(max_new_tokens=request.max_new_tokens, repeat=request.repeat, num_threads=num_threads)
    tokenizer = Tokenizer(request.weights)
    prompts, is_text = _prompts(request, plan, tokenizer)
    _warn_of_missing_kernels(plan, request.device_type)
    concluded: list[Run] = []

    def conclude(result: RunResult) -> Callable[[Session], None]:
        run = _checked(request, plan, result, prompts, tokenizer if is_text else None)
        concluded.append(run)
        outcome = JobOutcome(exit_code=run.exit_code, result=run.to_json())
        return lambda session: add_end(session, str(request.job), outcome)

    result = run_plan(
        plan,
        weights=request.weights,
        random_weights=request.random_weights,
        prompts=prompts,
        max_new_tokens=request.max_new_tokens,
        repeat=request.repeat,
        device_type=request.device_type,
        num_threads=num_threads,
        db_url=request.db_url,
        stall_timeout_s=request.stall_timeout_s,
        conclude=None if request.job is None else conclude,
    )
    return concluded[0] if concluded else _checked(request, plan, result, prompts, tokenizer if is_text else None)


def _checked(
    request: RunRequest, plan: Plan, result: RunResult, prompts: tuple[TokenIds, ...], tokenizer: Tokenizer | None
) -> Run:
    """The run with its tokens compared and, where there is a tokenizer, as text."""
    checks = None
    if request.check and request.weights is not None and is_first_process():
        checks = check_tokens(
            result.requests,
            prompts,
            request.weights,
            dtype=plan.precision,
            max_new_tokens=request.max_new_tokens,
            end_ids=end_ids(request.weights),
            device_type=request.device_type,
        )
    texts = None if tokenizer is None else tuple(tokenizer.decode(one.token_ids) for one in result.requests)
    return Run(plan=plan, result=result, texts=texts, checks=checks)


def write_files(request: RunRequest, run: Run) -> None:
    """Write `--output` and `--trace`, after the run was printed: a disk that is full by now loses neither."""
    if request.output is not None:
        write_json(request.output, run.to_json())
    if request.plot is not None and run.result.waterfall is not None:
        title = f"{layout_of(run.plan.parallel)}: from the peak of the ranks to the makespan"
        replace_file(request.plot, drawing(run.result.planned_waterfall, run.result.waterfall, title).encode())
    if request.trace is not None:
        write_trace(request.trace, run.plan, run.result)


def _prompts(request: RunRequest, plan: Plan, tokenizer: Tokenizer) -> tuple[tuple[TokenIds, ...], bool]:
    if request.check and request.weights is None:
        raise UserError("--check", "random weights", "Transformers needs a checkpoint: give --weights")
    if request.prompts is not None:
        return read_prompts(request.prompts, plan.requests, tokenizer)
    if (request.weights is None) != request.random_weights:
        raise UserError("--weights", request.weights or "", "give either a folder of weights or --random-weights")
    shape = model_shape(plan.model, request.weights)  # a layout that cannot be run is refused before prompts are made
    check_layout(plan, shape, max_new_tokens=request.max_new_tokens, device_type=request.device_type)
    return random_prompts(plan.requests, shape.vocab_size), False


def _warn_of_missing_kernels(plan: Plan, device_type: str) -> None:
    """One line on standard error where attention kernels of the plan are missing. Raises UserError for no device."""
    check_device_type(device_type)
    kernels = attention_kernels(plan, device_type)
    missing = missing_kernels(plan, kernels)
    if missing and is_first_process():
        click.echo(
            f"attention_kernels: {', '.join(missing)}: not available here ({device_type}, {plan.precision}); "
            f"{kernels.usual} runs instead, and the prediction does not hold for it "
            "(isochunk tune plans with the kernels that isochunk profile measured on this machine)",
            err=True,
        )


def _check_writable(request: RunRequest) -> None:
    """Not after the run: a place where nothing can be written would lose it."""
    for option, path in (("--output", request.output), ("--plot", request.plot), ("--trace", request.trace)):
        if path is not None and is_first_process():
            check_writable(option, path)

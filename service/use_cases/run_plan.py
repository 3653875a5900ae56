"""What `isochunk run-plan` does around a run: prompts from a file, the check, the files written, the tables printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db.errors import UserError, printable
from db.files.documents import write_json
from db.files.replacement import check_writable
from profiler.comm.launch import is_first_process
from profiler.hardware.device import default_num_threads
from runtime.run.preparation import check_counts, check_layout, model_shape, with_dtype
from runtime.run.prompts import TokenIds, Tokenizer, random_prompts, read_prompts
from runtime.run.reference import TokenCheck, check_tokens
from runtime.run.result import RunResult
from runtime.run.run import run_plan
from runtime.run.trace import write_trace
from runtime.stage.place import world_size
from runtime.weights.generation import end_ids
from service.cli.output import print_table
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
    repeat: int
    device_type: str
    threads_per_rank: int | None
    dtype: str | None
    db_url: str | None
    stall_timeout_s: float | None = None


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
        num_threads = default_num_threads(request.device_type, world_size(plan.parallel))
    check_counts(max_new_tokens=request.max_new_tokens, repeat=request.repeat, num_threads=num_threads)
    tokenizer = Tokenizer(request.weights)
    prompts, is_text = _prompts(request, plan, tokenizer)
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
    )
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
    texts = tuple(tokenizer.decode(one.token_ids) for one in result.requests) if is_text else None
    return Run(plan=plan, result=result, texts=texts, checks=checks)


def write_files(request: RunRequest, run: Run) -> None:
    """Write `--output` and `--trace`, after the run was printed: a disk that is full by now loses neither."""
    if request.output is not None:
        write_json(request.output, run.to_json())
    if request.trace is not None:
        write_trace(request.trace, run.plan, run.result)


def print_run(run: Run) -> None:
    """Print a row for each request and one for the plan."""
    predicted = run.plan.predicted
    ttft = list(predicted.ttft_s) if predicted and predicted.ttft_s else [None] * len(run.plan.requests)
    rows: list[list[object]] = []
    for index, (request, outcome) in enumerate(zip(run.plan.requests, run.result.requests, strict=True)):
        equal = run.checks[index].equal if run.checks is not None else None
        rows.append([request.id, request.prompt_tokens, ttft[index], outcome.ttft_s, _shown(run, index), equal])
    print_table(("request", "prompt tokens", "predicted TTFT s", "TTFT s", "new tokens", "tokens equal"), rows)
    result, parallel = run.result, run.plan.parallel
    is_published = result.mfu is not None
    columns = ["plan", "rounds", "predicted s", "measured s", "error", "MFU", "MFU of", "TPOT s", "warm-up s", "run"]
    row = [
        f"TP{parallel.tp_size} PP{parallel.pp_size} {run.plan.policy or ''}".strip(),
        len(run.plan.rounds),
        result.predicted_makespan_s,
        result.makespan_s,
        None if result.error is None else f"{result.error:+.1%}",
        _percent(result.mfu if is_published else result.mfu_of_ceiling),
        "published peak" if is_published else None if result.mfu_of_ceiling is None else "measured ceiling",
        result.tpot_s,
        result.warm_up_s,
        result.run_id,
    ]
    print_table(columns, [row])
    for check in run.checks or ():
        if not check.equal:
            print(
                f"{printable(check.id)}: new token {check.first_mismatch} differs from Transformers', "
                f"whose two best logits are {check.top2_margin} apart there"
            )


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


def _check_writable(request: RunRequest) -> None:
    """Not after the run: a place where nothing can be written would lose it."""
    for option, path in (("--output", request.output), ("--trace", request.trace)):
        if path is not None and is_first_process():
            check_writable(option, path)


def _shown(run: Run, index: int, limit: int = 8) -> str:
    if run.texts is not None:
        return run.texts[index]
    ids = run.result.requests[index].token_ids
    return " ".join(map(str, ids[:limit])) + (" ..." if len(ids) > limit else "")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"

"""Prints the result of a run as tables."""

from __future__ import annotations

from db.errors import printable
from runtime.run.result import RunResult
from service.cli.output import show_table
from service.reasons.run_words import in_profile_words
from service.use_cases.run_plan import Run
from tuner.plan.layout import layout_of
from tuner.waterfall.steps import to_rows


def print_run(run: Run) -> None:
    """Print a row for each request and one for the plan."""
    predicted = run.plan.predicted
    ttft = list(predicted.ttft_s) if predicted and predicted.ttft_s else [None] * len(run.plan.requests)
    rows: list[list[object]] = []
    for index, (request, outcome) in enumerate(zip(run.plan.requests, run.result.requests, strict=True)):
        equal = run.checks[index].equal if run.checks is not None else None
        rows.append([request.id, request.prompt_tokens, ttft[index], outcome.ttft_s, _shown(run, index), equal])
    show_table(("request", "prompt tokens", "predicted TTFT s", "TTFT s", "new tokens", "tokens equal"), rows)
    result, parallel = run.result, run.plan.parallel
    is_published = result.mfu is not None
    columns = ["plan", "rounds", "predicted s", "measured s", "error", "MFU", "MFU of", "TPOT s", "warm-up s", "run"]
    row = [
        f"{layout_of(parallel)} {run.plan.policy or ''}".strip(),
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
    show_table(columns, [row])
    if result.slowdown is not None:
        print(in_profile_words(result.slowdown, result.error_at_profiled_speed))
    _print_waterfall(result)
    for check in run.checks or ():
        if not check.equal:
            print(
                f"{printable(check.id)}: new token {check.first_mismatch} differs from Transformers', "
                f"whose two best logits are {check.top2_margin} apart there"
            )


def _print_waterfall(result: RunResult) -> None:
    """The way from the chip's peak to the makespan, predicted beside measured."""
    if result.waterfall is None:
        return
    planned = result.planned_waterfall
    rows: list[list[object]] = []
    for name, planned_s, measured_s in to_rows(planned, result.waterfall):
        shares = [
            None if seconds is None or each is None else 100 * seconds / each.makespan_s
            for seconds, each in ((planned_s, planned), (measured_s, result.waterfall))
        ]
        rows.append([name, planned_s, shares[0], measured_s, shares[1]])
    rows.append(["makespan", planned and planned.makespan_s, planned and 100.0, result.waterfall.makespan_s, 100.0])
    title = "From the peak to the makespan; kinds of measured rounds as predicted"
    show_table(["step", "predicted s", "%", "measured s", "%"], rows, title=title)
    if result.moves and planned is not None:
        move = result.moves[0]
        print(
            f"What would move it most: {move.change}, {1.0 - move.makespan_s / planned.makespan_s:.1%} less as planned"
        )


def _shown(run: Run, index: int, limit: int = 8) -> str:
    if run.texts is not None:
        return run.texts[index]
    ids = run.result.requests[index].token_ids
    return " ".join(map(str, ids[:limit])) + (" ..." if len(ids) > limit else "")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"

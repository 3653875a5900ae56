"""Prints the result of `isochunk tune` as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from service.cli.output import show_pairs, show_table, wrapped
from service.reasons.precision import PrecisionStep
from service.reasons.recommendation import gap_in_words
from service.reasons.sought import NAMES, factor_over, move_in_words
from service.reasons.words import explanation_in_words, refusals_in_words
from service.use_cases.tune_report import TuneReport, classes_json, replay_json
from tuner.fit.uncertainty import widened_uncertainty
from tuner.plan.layout import layout_of
from tuner.rounds.round_plan import RoundPlan
from tuner.workload.objective import Objective
from tuner.workload.workload import counted

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor the fit
    from tuner.fit.whole.costs import Costs
    from tuner.replays.replay import Replay
    from tuner.rounds.schedule import Evaluation
    from tuner.search.autotune import Trial
    from tuner.search.layouts import Candidate

FIELDS = {
    "policy": "policy",
    "taken": "taken",
    "rounds": "num_rounds",
    "makespan s": "makespan_s",
    "mean TTFT s": "mean_ttft_s",
    "p99 s": "p99_ttft_s",
    "TPOT s": "mean_tpot_s",
    "p99 TPOT s": "p99_tpot_s",
    "goodput/s": "goodput_per_s",
    "tokens/s": "tokens_per_s",
    "p50 s": "p50_ttft_s",
    "p90 s": "p90_ttft_s",
}
"""Columns of replays, by what of a replay's JSON they show."""
DECODE_COLUMNS = (
    "policy", "goodput/s", "mean TTFT s", "TPOT s", "p99 s", "p99 TPOT s", "taken", "rounds", "tokens/s",
)  # fmt: skip
REPLAY_COLUMNS = ("policy", "makespan s", "mean TTFT s", "p99 s", "rounds", "tokens/s", "taken", "p50 s", "p90 s")
SOUGHT = {
    Objective.MAKESPAN: "makespan s",
    Objective.MEAN_TTFT: "mean TTFT s",
    Objective.P99_TTFT: "p99 s",
    Objective.SLA: "met %",
    Objective.LATENESS: "latest s",
}
"""The column of what is made least; it stands first."""
DEADLINE_COLUMNS = ("met %", "latest s")
MOST_NAMED = 4
"""Layouts and reasons that are named one by one."""


def print_report(report: TuneReport) -> None:
    """Print what is recommended and how sure that is, then the layouts, the policies, and what the fits are like."""
    for note in report.notes:
        print(f"{wrapped(note)}\n")
    _print_recommendation(report)
    if report.precisions:
        _print_precisions(report.precisions, _objective(report))
    if report.trials:
        show_table(
            ["layout", "policy", *_trial_columns(report), "error %", "failed"],
            [_trial_row(trial, _objective(report)) for trial in report.trials],
            title=f"Measured on this machine{_by(report)}, the best first",
        )
    if report.candidates:
        _print_layouts(report)
    if report.explanation is not None and (why := explanation_in_words(report.explanation)):
        print(f"{wrapped(why)}\n")
    if report.plan.predicted is not None and report.plan.predicted.moves:
        moved = move_in_words(_objective(report), report.recommendation.evaluation, report.plan.predicted.moves[0])
        print(f"{wrapped(f'What would move it most, planned anew: {moved}.')}\n")
    if report.policies:
        _print_policies(report)
    if report.replays:
        _print_replays(report)
    sentences = (_verdict(report), gap_in_words(report.plan), _ttft_gap(report), _impossible(report))
    print(f"{wrapped(' '.join(filter(None, sentences)))}\n")
    if report.hardware is not None:
        _print_fits(report)
    if report.costs is not None:
        _print_corrections(report.costs)
    for written in (report.output, report.plot):
        if written:
            print(f"Wrote {written}")


def _print_policies(report: TuneReport) -> None:
    """A row for each policy that planned the batch."""
    window = "" if report.plan.window is None else f", at most {report.plan.window} rounds in flight"
    met = _deadline_columns(report)
    percentile = 99 if _objective(report) is Objective.P99_TTFT else 90
    show_table(
        ["policy", "rounds", "seconds", "TTFT s", f"p{percentile} s", *met, "bubble %", "gap %", "plan ms"],
        [_policy_row(planned, percentile) for planned in report.policies],
        title=f"Policies on {layout_of(report.plan.parallel)}{window}; TTFT in the mean",
    )


def _print_replays(report: TuneReport) -> None:
    """A row for each policy that the trace was replayed under, and one for each class of requests."""
    requests, met, sought = report.plan.requests, _deadline_columns(report), SOUGHT[_objective(report)]
    decoded = any(request.output_tokens > 1 for request in requests)
    named = DECODE_COLUMNS if decoded else REPLAY_COLUMNS
    first = named.index("p99 s") + 1
    columns = [*named[:first], *met, *named[first:]]
    if sought in columns and not decoded:  # of answers decoded beside, the goodput
        columns = list(dict.fromkeys(["policy", sought, *columns]))
    show_table(
        columns,
        [_replay_row(replay, columns) for replay in report.replays],
        title=f"{len(requests)} requests as they arrive, each policy seeing a request when it arrives",
    )
    classes = classes_json(report)
    if classes:
        show_table(
            ["class", "requests", "weight", "mean TTFT s", "p99 s"],
            [list(row.values()) for row in classes],
            title=f"Classes under {report.plan.policy}",
        )


def _print_precisions(steps: Sequence[PrecisionStep], objective: Objective) -> None:
    """What each precision would bring here, and why some were not taken."""
    unit, scale = ("%", 100.0) if objective is Objective.SLA else ("s", 1.0)
    own = None if steps[0].evaluation is None else steps[0].evaluation.sought(objective)
    show_table(
        ["precision", "loss %", f"{NAMES[objective]} {unit}", "times as fast", "attention %"],
        [
            [
                step.precision,
                None if step.loss is None else 100.0 * step.loss,
                scale * step.evaluation.sought(objective),
                None if own is None else factor_over(objective, step.evaluation.sought(objective), own),
                None if step.attention_share is None else 100.0 * step.attention_share,
            ]
            for step in steps
            if step.evaluation is not None
        ],
        title="Precisions, each with its best layout and rounds; 8-bit linears make attention no faster",
    )  # fmt: skip
    for step in steps:
        if step.refusal is not None:
            print(wrapped(f"{step.precision} is not taken: {step.refusal}"))
    print()


def _print_recommendation(report: TuneReport) -> None:
    recommended = report.recommendation
    warning = recommended.warning()
    if warning:
        print(f"{wrapped(warning)}\n")
    show_pairs(recommended.pairs(), title="Recommended")


def _print_fits(report: TuneReport) -> None:
    """How far off the fits are at points that were left out, and which operations had none to leave out."""
    assert report.hardware is not None
    rows: list[list[object]] = [
        [error.op, error.num_points, *(100 * share for share in (error.median, error.p90, error.worst))]
        if error.num_points
        else [error.op, 0, None, None, None]
        for error in report.held_out
    ]
    show_table(
        ["fit", "points left out", "median error %", "p90 %", "worst %"],
        rows,
        title=f"Held-out errors on {report.hardware.device}",
    )
    from tuner.fit.holdout import UNTESTED  # imports the database

    untested = [error.op for error in report.held_out if not error.num_points]
    if untested:
        print(
            wrapped(
                f"Too few points of {', '.join(untested)} to leave one out: the width above takes an error of "
                f"{UNTESTED:.0%} for them.\n"
            )
            + "\n"
        )


def _print_corrections(costs: Costs) -> None:
    """Corrections by rank skew and by earlier runs."""
    factors, correction = costs.rank_skew.factors, costs.correction
    if factors:
        print(f"Each rank's time over the slowest's: {', '.join(f'{factor:.3f}' for factor in factors)}\n")
    if correction.num_rounds:
        print(
            f"Corrected by {correction.num_rounds} rounds of {correction.num_runs} earlier runs: "
            f"token-wise work x {correction.tokens_scale:.3f}, attention x {correction.attention_scale:.3f} and "
            f"{1e3 * correction.round_s:+.2f} ms a round; "
            f"median error of a round {100 * correction.error_before:.1f} % -> {100 * correction.error_after:.1f} %\n"
        )


def _verdict(report: TuneReport) -> str:
    """How good the plan is: beside the best possible makespan."""
    plan = report.plan
    predicted = plan.predicted
    if predicted is None or predicted.lower_bound_s is None or predicted.gap is None:
        return ""
    what = "" if _objective(report) is Objective.MAKESPAN else "its makespan of "
    return (
        f"The plan, {plan.policy}: {what}{predicted.makespan_s:.4g} s, at most {predicted.gap:.2%} above the best "
        f"possible (with chunks on the same multiples no plan takes less than {predicted.lower_bound_s:.4g} s)."
    )


def _ttft_gap(report: TuneReport) -> str:
    """How far the mean TTFT is above the best possible at most."""
    bound_s, evaluation = report.mean_ttft_bound_s, report.recommendation.evaluation
    if not bound_s:
        return ""
    mean_s = evaluation.mean_ttft_s
    limited = not report.replays and report.plan.tuned_for is not None and report.plan.tuned_for.max_makespan_increase
    beside = ", which counts no decoded token" if evaluation.tpot_s else ", whatever its makespan" if limited else ""
    return (
        f"Its mean TTFT of {mean_s:.4g} s is at most {mean_s / bound_s - 1.0:.1%} above the best possible "
        f"(no plan has less than {bound_s:.4g} s{beside})."
    )


def _print_layouts(report: TuneReport) -> None:
    """The best layout of each family, how many there are beside them, and why some cannot run."""
    from tuner.search.explanation import best_of_families

    families = best_of_families(report.candidates)
    assert families[0].rounds is not None
    sought = _sought(report, families[0].rounds)
    several = len(report.plan.requests) > 1 and "TTFT s" not in sought
    others = ["makespan s", "+- %", "note", "bubble %", "GiB", "rounds", "TTFT s" if several else "layers"]
    show_table(
        ["layout", *sought, *others],
        [_candidate_row(report, candidate, several=several) for candidate in families],
        title="The best layout of each family (close: too close to tell), and GiB of its fullest rank",
    )
    num_refused = sum(candidate.refusal is not None for candidate in report.candidates)
    print(
        wrapped(
            f"{counted(len(report.candidates), 'layout')}: {report.num_planned} planned, {report.num_proven_worse} "
            f"proven no better without being planned, {report.num_estimated_worse} clearly worse by an estimate, "
            f"{num_refused} that cannot run."
        )
    )
    beyond = [str(candidate.layout) for candidate in families if candidate.extrapolates]
    if beyond:
        print(wrapped(f"Beyond the measured range: {', '.join(beyond)}."))
    for candidate in families[:MOST_NAMED]:
        if candidate.is_bound_by_memory:
            print(wrapped(f"Memory allows {candidate.layout} {_allowed(candidate)}."))
        if candidate.assumed:
            assumed = ", ".join(map(str, candidate.assumed))
            print(wrapped(f"Not measured, estimated from the topology's links: {assumed}, in {candidate.layout}."))
        if candidate.alike:
            print(wrapped(f"Not measured, taken to be alike: {'; '.join(candidate.alike)}, in {candidate.layout}."))
    refusals = refusals_in_words(report.candidates)
    for line in refusals[:MOST_NAMED]:
        print(wrapped(line))
    if len(refusals) > MOST_NAMED:
        print(f"{len(refusals) - MOST_NAMED} more reasons: --json has all of them")
    print()


def _allowed(candidate: Candidate) -> str:
    assert candidate.limits is not None
    rounds = f"rounds of at most {candidate.limits.max_round_tokens} tokens"
    held = candidate.limits.max_kv_tokens
    return rounds if held is None else f"{rounds} and the KV of {held} tokens at once"


def _layers(partition: Sequence[int]) -> str:
    """The layers of each group; many alike as one number."""
    if len(partition) > MOST_NAMED and len(set(partition)) == 1:
        return f"{len(partition)} x {partition[0]}"
    words = "-".join(map(str, partition))
    least, most = min(partition), max(partition)
    return words if len(words) <= 12 else f"{len(partition)} x {least} to {most}"


def _candidate_row(report: TuneReport, candidate: Candidate, *, several: bool) -> list[object]:
    planned, recommended = candidate.rounds, report.recommendation
    assert planned is not None
    evaluation, name = planned.evaluation, str(candidate.layout)
    width = widened_uncertainty(candidate.uncertainty(report.held_out), recommended.share_missing)
    return [
        name, *_sought(report, planned).values(), planned.makespan_s, round(100 * width, 1),
        "close" if name in recommended.close else "", 100 * evaluation.bubble_share,
        candidate.peak_memory_bytes / 2**30, len(planned.rounds),
        evaluation.mean_ttft_s if several else _layers(candidate.layer_partition),
    ]  # fmt: skip


def _by(report: TuneReport) -> str:
    """By which figure, where it is not the makespan."""
    objective = _objective(report)
    return "" if objective is Objective.MAKESPAN else f" by {NAMES[objective]}"


def _objective(report: TuneReport) -> Objective:
    return Objective(report.options.get("objective", Objective.MAKESPAN))


def _sought(report: TuneReport, planned: RoundPlan) -> dict[str, object]:
    """What layouts are compared by beside the makespan: columns and a layout's values."""
    evaluation = planned.evaluation
    match _objective(report):
        case Objective.MEAN_TTFT if len(report.plan.requests) > 1:
            return {"TTFT s": evaluation.mean_ttft_s}
        case Objective.P99_TTFT:
            return {"p99 s": float(np.percentile(evaluation.ttft_s, 99))}
        case Objective.SLA | Objective.LATENESS:
            return dict(zip(_deadline_columns(report), _deadlines_met(evaluation), strict=True))
        case _:
            return {}


def _replay_row(replay: Replay, columns: Sequence[str]) -> list[object]:
    shown: dict[str, object] = {name: replay_json(replay).get(field) for name, field in FIELDS.items()}
    shown |= dict(zip(DEADLINE_COLUMNS, _deadlines_met(replay.evaluation), strict=False))
    return [shown[column] for column in columns]


def _policy_row(planned: RoundPlan, percentile: int) -> list[object]:
    evaluation = planned.evaluation
    return [
        planned.policy, len(planned.rounds), planned.makespan_s, evaluation.mean_ttft_s,
        float(np.percentile(evaluation.ttft_s, percentile)), *_deadlines_met(evaluation),
        round(100 * evaluation.bubble_share, 4), round(100 * planned.gap, 4), 1e3 * planned.planning_s,
    ]  # fmt: skip


def _deadline_columns(report: TuneReport) -> list[str]:
    """Columns of how many deadlines are met, by weight, and how late the latest is; none without deadlines."""
    requests = report.plan.requests
    has_deadlines = any((request.sla_ttft_s or request.sla_tpot_s) is not None for request in requests)
    return [*DEADLINE_COLUMNS] if has_deadlines else []


def _deadlines_met(evaluation: Evaluation) -> list[object]:
    if not evaluation.has_limits:
        return []
    late_s = evaluation.lateness_s
    return [100 * evaluation.sla_weight, late_s if math.isfinite(late_s) else None]


def _impossible(report: TuneReport) -> str:
    """Which deadlines no plan meets."""
    if not report.impossible:
        return ""
    first = min(report.impossible, key=lambda one: one.request.new_tokens)
    others = len(report.impossible) - 1
    return f"No plan meets the deadline of {first}" + (f" ({others} more are like it)." if others else ".")


def _trial_columns(report: TuneReport) -> list[str]:
    unit = "met %" if _objective(report) is Objective.SLA else "s"
    return [f"measured {unit}", f"predicted {unit}"]


def _trial_row(trial: Trial, objective: Objective) -> list[object]:
    choice, measured, predicted = trial.choice, trial.measured_s, trial.choice.predicted_s
    if objective is Objective.SLA:  # is counted down from none
        shown = [None if figure is None else -100 * figure for figure in (measured, predicted)]
    else:
        shown = [measured, predicted]
    error = None if not measured or objective.needs_deadlines else 100 * (predicted / measured - 1.0)
    return [choice.layout, choice.policy, *shown, error, trial.error]

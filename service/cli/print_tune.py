"""What `isochunk tune` found, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.cli.output import print_table
from service.use_cases.tune_report import TuneReport, replay_json
from tuner.rounds.round_plan import RoundPlan

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor SciPy
    from tuner.fit.layer_costs import LayerCosts
    from tuner.search.autotune import Trial
    from tuner.search.layouts import Candidate


def print_report(report: TuneReport) -> None:
    """Print the tables of a report."""
    if report.hardware is not None:
        print_table(
            ["fit", "points left out", "median error %", "p90 %", "worst %"],
            [[e.op, e.num_points, 100 * e.median, 100 * e.p90, 100 * e.worst] for e in report.held_out],
            title=f"Held-out errors on {report.hardware.device}",
        )
    if report.costs is not None:
        _print_corrections(report.costs)
    if report.candidates:
        print_table(
            ["layout", "layers", "rounds", "makespan s", "mean TTFT s", "bubble %", "GiB/rank", "note"],
            [_candidate_row(candidate) for candidate in report.candidates],
            title="Layouts, the best first",
        )
        print(f"{_certainty(report)}\n")
    parallel, requests = report.plan.parallel, report.plan.requests
    if report.policies:
        print_table(
            ["policy", "rounds", "makespan s", "mean TTFT s", "p90 TTFT s", "bubble %", "gap %", "planning ms"],
            [_policy_row(planned) for planned in report.policies],
            title=f"Policies on TP{parallel.tp_size} PP{parallel.pp_size}, window {report.plan.window}",
        )
    if report.replays:
        print_table(
            ["policy", "taken", "rounds", "makespan s", "mean TTFT s", "p50 s", "p90 s", "p99 s", "tokens/s"],
            [list(replay_json(replay).values()) for replay in report.replays],
            title=f"{len(requests)} requests as they arrive, each policy seeing a request when it arrives",
        )
    print(f"{_verdict(report)}\n")
    if report.trials:
        print_table(
            ["layout", "policy", "predicted s", "measured s", "error %", "failed"],
            [_trial_row(trial) for trial in report.trials],
            title="Measured on this machine, the best first",
        )
    if report.output:
        print(f"Wrote {report.output}")


def _print_corrections(costs: LayerCosts) -> None:
    """What ranks and earlier runs told beside the rows."""
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
    return (
        f"The plan, {plan.policy}: {predicted.makespan_s:.4g} s, at most {predicted.gap:.2%} above the best possible "
        f"(no plan takes less than {predicted.lower_bound_s:.4g} s)."
    )


def _certainty(report: TuneReport) -> str:
    """How sure the prediction is, and which other layouts it cannot tell apart from the plan's."""
    predicted, parallel = report.plan.predicted, report.plan.parallel
    if predicted is None or predicted.uncertainty is None:
        return ""
    told = f"Predicted: {predicted.makespan_s:.4g} s, give or take {predicted.uncertainty:.1%}."
    most_s = (1.0 + predicted.uncertainty) * predicted.makespan_s
    close = [
        str(candidate.layout)
        for candidate in report.candidates
        if candidate.rounds and not candidate.refusal and candidate.rounds.makespan_s <= most_s
        and (candidate.layout.tp_size, candidate.layout.pp_size) != (parallel.tp_size, parallel.pp_size)
    ]  # fmt: skip
    if report.trials or not close:
        return told
    return f"{told} Too close to tell: {', '.join(close)}; --measure N runs the best."


def _candidate_row(candidate: Candidate) -> list[object]:
    planned = candidate.rounds
    layers = "-".join(map(str, candidate.layer_partition)) or None
    note = candidate.refusal or ("beyond the measured range" if candidate.extrapolates else "")
    if planned is None:
        return [str(candidate.layout), layers, None, None, None, None, None, note]
    evaluation = planned.evaluation
    return [
        str(candidate.layout), layers, len(planned.rounds), planned.makespan_s, evaluation.mean_ttft_s,
        100 * evaluation.bubble_share, candidate.peak_memory_bytes / 2**30, note,
    ]  # fmt: skip


def _policy_row(planned: RoundPlan) -> list[object]:
    evaluation = planned.evaluation
    return [
        planned.policy, len(planned.rounds), planned.makespan_s, evaluation.mean_ttft_s, evaluation.p90_ttft_s,
        100 * evaluation.bubble_share, 100 * planned.gap, 1e3 * planned.planning_s,
    ]  # fmt: skip


def _trial_row(trial: Trial) -> list[object]:
    choice, measured = trial.choice, trial.measured_s
    error = None if measured is None else 100 * (choice.predicted_s / measured - 1.0)
    return [choice.layout, choice.policy, choice.predicted_s, measured, error, trial.error]

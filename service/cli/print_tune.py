"""What `isochunk tune` found, as tables for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.cli.output import print_table
from service.reasons.words import in_words
from service.use_cases.tune_report import TuneReport, replay_json
from tuner.plan.layout import layout_of
from tuner.rounds.round_plan import RoundPlan

if TYPE_CHECKING:  # planning from a cost model file needs neither the database nor SciPy
    from tuner.fit.whole_costs import Costs
    from tuner.search.autotune import Trial
    from tuner.search.layouts import Candidate

PAGE_WIDTH = 80
MOST_NAMED = 4
"""Layouts and reasons that are named one by one."""


def print_report(report: TuneReport) -> None:
    """Print the tables of a report."""
    for note in report.notes:
        print(f"{_wrapped(note)}\n")
    if report.hardware is not None:
        print_table(
            ["fit", "points left out", "median error %", "p90 %", "worst %"],
            [[e.op, e.num_points, 100 * e.median, 100 * e.p90, 100 * e.worst] for e in report.held_out],
            title=f"Held-out errors on {report.hardware.device}",
        )
    if report.costs is not None:
        _print_corrections(report.costs)
    if report.candidates:
        _print_layouts(report)
        print(f"{_wrapped(_certainty(report))}\n")
    if report.explanation is not None:
        print(f"{_wrapped(in_words(report.explanation))}\n")
    parallel, requests = report.plan.parallel, report.plan.requests
    if report.policies:
        print_table(
            ["policy", "rounds", "seconds", "TTFT s", "p90 s", "bubble %", "gap %", "plan ms"],
            [_policy_row(planned) for planned in report.policies],
            title=f"Policies on {layout_of(parallel)}, window {report.plan.window}; TTFT in the mean",
        )
    if report.replays:
        print_table(
            ["policy", "taken", "rounds", "makespan s", "mean TTFT s", "p50 s", "p90 s", "p99 s", "tokens/s"],
            [list(replay_json(replay).values()) for replay in report.replays],
            title=f"{len(requests)} requests as they arrive, each policy seeing a request when it arrives",
        )
    print(f"{_wrapped(_verdict(report))}\n")
    if report.trials:
        print_table(
            ["layout", "policy", "predicted s", "measured s", "error %", "failed"],
            [_trial_row(trial) for trial in report.trials],
            title="Measured on this machine, the best first",
        )
    for written in (report.output, report.plot):
        if written:
            print(f"Wrote {written}")


def _print_corrections(costs: Costs) -> None:
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
        and candidate.layout != layout_of(parallel)
    ]  # fmt: skip
    if report.trials or not close:
        return told
    names = ", ".join(close[:MOST_NAMED]) + (f" and {len(close) - MOST_NAMED} more" if len(close) > MOST_NAMED else "")
    return f"{told} Too close to tell: {names}; --measure N runs the best."


def _print_layouts(report: TuneReport) -> None:
    """The best layout of each family, how many there are beside them, and why some cannot run."""
    from tuner.search.explanation import best_of_families

    families = best_of_families(report.candidates)
    several = len(report.plan.requests) > 1
    print_table(
        ["layout", "TTFT s" if several else "layers", "rounds", "makespan s", "bubble %", "GiB"],
        [_candidate_row(candidate, several=several) for candidate in families],
        title="The best layout of each family, and GiB of its fullest rank",
    )
    refused: dict[str, int] = {}
    for candidate in report.candidates:
        if candidate.refusal:
            refused[candidate.refusal] = refused.get(candidate.refusal, 0) + 1
    print(
        _wrapped(
            f"{len(report.candidates)} layouts: {report.num_planned} planned, {report.num_proven_worse} proven no "
            f"better without being planned, {sum(refused.values())} that cannot run."
        )
    )
    beyond = [str(candidate.layout) for candidate in families if candidate.extrapolates]
    if beyond:
        print(_wrapped(f"Beyond the measured range: {', '.join(beyond)}."))
    for candidate in families[:MOST_NAMED]:
        if candidate.assumed:
            assumed = ", ".join(map(str, candidate.assumed))
            print(_wrapped(f"Not measured but told by the topology's links: {assumed}, in {candidate.layout}."))
    for reason, count in list(refused.items())[:MOST_NAMED]:
        example = next(str(each.layout) for each in report.candidates if each.refusal == reason)
        others = f" and {count - 1} more" if count > 1 else ""
        print(_wrapped(f"{example}{others}: {reason}"))
    if len(refused) > MOST_NAMED:
        print(f"{len(refused) - MOST_NAMED} more reasons: --json has all of them")
    print()


def _wrapped(words: str) -> str:
    return textwrap.fill(words, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _layers(partition: Sequence[int]) -> str:
    """The layers of each group; many alike as one number."""
    if len(partition) > MOST_NAMED and len(set(partition)) == 1:
        return f"{len(partition)} x {partition[0]}"
    words = "-".join(map(str, partition))
    least, most = min(partition), max(partition)
    return words if len(words) <= 12 else f"{len(partition)} x {least} to {most}"


def _candidate_row(candidate: Candidate, *, several: bool) -> list[object]:
    planned = candidate.rounds
    assert planned is not None
    evaluation = planned.evaluation
    return [
        str(candidate.layout), evaluation.mean_ttft_s if several else _layers(candidate.layer_partition),
        len(planned.rounds), planned.makespan_s, 100 * evaluation.bubble_share, candidate.peak_memory_bytes / 2**30,
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

"""`isochunk tune --measure N`: runs the best of layouts and policies on this machine, and takes the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from db.errors import UserError
from db.store.provenance import now
from profiler.hardware.device import describe_hardware
from runtime.run.run import run_plan
from service.use_cases.tune_options import TuneOptions
from service.use_cases.tune_report import TuneReport
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan
from tuner.rounds.schedule import Objective
from tuner.search.autotune import Choice, autotune
from tuner.search.layouts import to_plan, with_rounds
from tuner.search.rules import Rules
from tuner.search.target import Target


def tune_measured(
    report: TuneReport, target: Target, rules: Rules, options: TuneOptions, echo: Callable[[str], None] | None
) -> TuneReport:
    """The report with the plan that ran fastest; raises UserError elsewhere than on the hardware planned for."""
    hardware, num_trials = report.hardware, options.measure
    assert hardware is not None and num_trials is not None
    here = describe_hardware(target.device_type, num_threads=hardware.num_threads)
    if here.fingerprint != hardware.fingerprint:
        raise UserError("--measure", num_trials, f"needs the hardware that is planned for, {hardware.device}")
    study = f"{target.shape.name}-{now():%Y%m%dT%H%M%S}"

    def run(plan: Plan) -> float:
        result = run_plan(
            plan,
            random_weights=True,
            max_new_tokens=target.max_new_tokens,
            device_type=target.device_type,
            num_threads=hardware.num_threads,
            repeat=options.repeat,
            db_url=options.db_url,
            kind="tune-trial",
            study=study,
        )
        if echo:
            echo(f"{layout_of(plan.parallel)} {plan.policy}: {result.makespan_s:.3f} s measured")
        if rules.objective is Objective.MAKESPAN:
            return result.makespan_s
        return sum(request.ttft_s for request in result.requests) / len(result.requests)

    trials = autotune(_choices(report, target, rules), run, num_trials=num_trials)
    if trials[0].measured_s is None:
        raise UserError("--measure", num_trials, f"every run failed, the first with: {trials[0].error}")
    return replace(report, trials=trials, plan=trials[0].choice.plan)


def _choices(report: TuneReport, target: Target, rules: Rules) -> list[Choice]:
    """Every policy's plan on every layout that can run."""
    choices = []
    for candidate in report.candidates:
        if candidate.refusal or candidate.rounds is None:
            continue
        cost = candidate.layout_costs.cost_model(candidate.layer_partition)
        for planned in candidate.rules(rules).compare(cost, target.requests):
            chosen = with_rounds(target, candidate, planned, rules)
            if chosen.refusal:
                continue
            plan = to_plan(target, chosen, rules, uncertainty=chosen.uncertainty(report.held_out))
            expected = planned.evaluation
            predicted_s = expected.makespan_s if rules.objective is Objective.MAKESPAN else expected.mean_ttft_s
            choices.append(
                Choice(layout=str(candidate.layout), policy=planned.policy, plan=plan, predicted_s=predicted_s)
            )
    return choices

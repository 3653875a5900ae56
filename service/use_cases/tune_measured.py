"""`isochunk tune --measure N`: runs the best of layouts and policies on this machine, and takes the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import text

from db.errors import UserError
from db.rows.hardware import Hardware
from db.rows.processes import is_running
from db.store.engine import Database
from db.store.failures import translated
from db.store.location import sqlite_path
from db.store.provenance import now
from profiler.hardware.device import describe_hardware
from runtime.run.run import run_plan
from service.reasons.sought import figure_in_words
from service.use_cases.tune_options import TuneOptions
from service.use_cases.tune_report import TuneReport
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan
from tuner.rounds.schedule import measured_evaluation
from tuner.search.autotune import Choice, InterruptedStudy, autotune, kept_study
from tuner.search.layouts import to_plan, with_rounds
from tuner.search.rules import Rules
from tuner.search.target import Target

if TYPE_CHECKING:
    import optuna

SCHEMA = "isochunk_studies"
"""Of Optuna's tables on PostgreSQL."""
MOST_PROMPTS = 100
"""Whose lengths tell studies apart."""


def tune_measured(
    database: Database,
    process_id: int,
    report: TuneReport,
    target: Target,
    rules: Rules,
    options: TuneOptions,
    echo: Callable[[str], None] | None,
) -> TuneReport:
    """The report with the plan that ran fastest; raises UserError elsewhere than on the hardware planned for.

    Trials are kept as they end. Interrupted, the best of those that ran is taken.
    """
    hardware, num_trials = report.hardware, options.measure
    assert hardware is not None and num_trials is not None
    here = describe_hardware(target.device_type, num_threads=hardware.num_threads)
    if here.fingerprint != hardware.fingerprint:
        raise UserError("--measure", num_trials, f"needs the hardware that is planned for, {hardware.device}")
    name = options.study or f"{target.shape.name}-{now():%Y%m%dT%H%M%S}"

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
            study=name,
        )
        ttft_s = [request.ttft_s for request in result.requests]
        measured = measured_evaluation(plan.requests, ttft_s, result.makespan_s)
        if echo:
            figure = figure_in_words(rules.objective, measured.sought(rules.objective))
            echo(f"{layout_of(plan.parallel)} {plan.policy}: {figure} measured")
        return measured.score(rules.objective)[0]

    with kept_in(database, target, rules, hardware, name) as study:
        if study is not None and echo:
            echo(f"Study {name}: the same command with --study {name} goes on with it")
        interrupted = False
        try:
            trials = autotune(
                _choices(report, target, rules),
                run,
                num_trials=num_trials,
                study=study,
                process_id=process_id,
                ended=lambda number: number != process_id and not is_running(database, number),
            )
        except InterruptedStudy as error:
            trials, interrupted = error.trials, True
    if not trials or trials[0].measured_s is None:
        raise UserError("--measure", num_trials, f"every run failed, the first with: {trials[0].error}")
    return replace(report, trials=trials, plan=trials[0].choice.plan, interrupted=interrupted)


@contextmanager
def kept_in(
    database: Database, target: Target, rules: Rules, hardware: Hardware, name: str
) -> Iterator[optuna.Study | None]:
    """The study of a name, kept by Optuna beside a SQLite file or in a schema of its own; None for one in memory."""
    import optuna

    about = {
        "model": target.shape.name,
        "precision": target.dtype,
        "hardware": f"{hardware.device} {hardware.fingerprint}",
        "objective": str(rules.objective),
        "prompts": ",".join(str(request.prompt_tokens) for request in target.requests[:MOST_PROMPTS]),
    }
    url = database.url
    if url.get_backend_name() == "sqlite":
        path = sqlite_path(url)
        if path is None:
            yield None
            return
        place, options = f"sqlite:///{path.absolute().with_name(f'{path.name}-studies')}", {}
    else:
        with database.session() as session:
            session.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        place = url.render_as_string(hide_password=False)
        options = {"connect_args": {"options": f"-csearch_path={SCHEMA}"}}
    try:
        yield kept_study(place, name, about, **options)
    except optuna.exceptions.StorageInternalError as error:
        with translated(place, database.lock_timeout_s):
            raise error.__cause__ or error from None


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
            assert chosen.rounds is not None
            evaluation = chosen.rounds.evaluation
            choices.append(
                Choice(
                    layout=str(candidate.layout),
                    policy=planned.policy,
                    plan=plan,
                    evaluation=evaluation,
                    predicted_s=evaluation.score(rules.objective)[0],
                )
            )
    return choices

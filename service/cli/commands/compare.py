"""`isochunk compare`: an engine's measured TTFT of a plan's batch, compared with the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.options import db_option, json_option
from service.cli.output import print_json, print_table

if TYPE_CHECKING:
    from service.engines.measured import Measured
    from tuner.plan.plan import Plan


@click.command(name="compare")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--keep", "hardware_id", type=int, metavar="ID", help="Keep it as a run of PLAN on this hardware.")
@db_option
@json_option
def command(plan: Path, file: Path, hardware_id: int | None, db_url: str | None, as_json: bool) -> None:
    """Compare the TTFT that an engine measured, in FILE, with the prediction of PLAN.

    FILE is the output of SGLang's bench_serving or of `vllm bench serve`, or their metrics as Prometheus's text.
    """
    from service.engines.measured import read_measured
    from tuner.plan.plan import load_plan

    read = load_plan(plan)
    measured = read_measured(file, read)
    run_id = None if hardware_id is None else _keep(read, measured, hardware_id, db_url)
    if as_json:
        print_json(measured.to_json() | {"run_id": run_id})
        return
    rows = [
        (one.name, one.predicted_s, one.measured_s, None if one.error is None else 100 * one.error)
        for one in measured.figures
    ]
    title = f"{measured.num_requests} requests by {measured.source}"
    print_table(("figure", "predicted s", "measured s", "error %"), rows, title=title)
    if run_id is not None:
        click.echo(f"Kept as run {run_id}")


def _keep(plan: Plan, measured: Measured, hardware_id: int, db_url: str | None) -> int:
    from db.errors import UserError
    from db.rows.hardware import get_hardware
    from db.rows.plans import save_plan_row
    from db.rows.runs import RunKind, RunOutcome, finish_run, start_run
    from db.store.engine import open_database

    if measured.makespan_s is None or measured.ttft_s is None:
        raise UserError("--keep", hardware_id, "needs the TTFT of each request: --output-details or --save-detailed")
    with open_database(db_url) as database:
        hardware = get_hardware(database, hardware_id)
        plan_id = save_plan_row(database, plan.to_json(), hardware_id=hardware_id)
        run_id = start_run(database, plan_id, hardware, kind=RunKind.ENGINE, details={"source": measured.source})
        predicted = plan.predicted.makespan_s if plan.predicted else None
        outcome = RunOutcome(makespan_s=measured.makespan_s, predicted_makespan_s=predicted, ttft_s=measured.ttft_s)
        finish_run(database, run_id, outcome)
    return run_id

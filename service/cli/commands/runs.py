"""`isochunk runs`: lists, explains, compares and clears runs."""

from __future__ import annotations

from typing import Any

import click

from db.errors import UserError
from service.cli.options import db_option, json_option
from service.cli.output import print_json, show_pairs, show_table


@click.group(name="runs", invoke_without_command=True)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@db_option
@json_option
@click.pass_context
def command(context: click.Context, limit: int, db_url: str | None, as_json: bool) -> None:
    """List runs, the newest first; explain, compare and clear them."""
    if context.invoked_subcommand is None:
        _show(_listed(db_url, [], limit), as_json, title="Runs, the newest first")


@command.command()
@click.argument("run_id", type=int, metavar="[ID]", required=False)
@db_option
@json_option
def explain(run_id: int | None, db_url: str | None, as_json: bool) -> None:
    """Say why the run of ID, or the newest, took longer or shorter than its plan predicts."""
    from db.store.engine import open_database
    from service.reasons.run_words import run_in_words
    from service.use_cases.runs import profile_command, run_details

    with open_database(db_url, read_only=True) as database:
        details = run_details(database, run_id)
    pairs = run_in_words(details, profile_command(details), "isochunk run-plan PLAN --repeat 3 ...")
    if as_json:
        print_json({"run_id": details.run.id, "words": dict(pairs)})
    else:
        show_pairs(pairs)


@command.command()
@click.argument("run_ids", type=int, metavar="ID ID ...", nargs=-1, required=True)
@db_option
@json_option
def compare(run_ids: tuple[int, ...], db_url: str | None, as_json: bool) -> None:
    """Show runs side by side, the fastest first: predicted, measured, at work and waiting a stage."""
    _show(_listed(db_url, list(run_ids), None), as_json, title="Runs, the fastest first", by_time=True)


@command.command()
@click.argument("run_ids", type=int, metavar="[ID ...]", nargs=-1)
@click.option("--study", metavar="NAME", help="All runs of this study of tune --measure.")
@click.option("--yes", is_flag=True, help="Do it; else only say what would go.")
@db_option
def clear(run_ids: tuple[int, ...], study: str | None, yes: bool, db_url: str | None) -> None:
    """Remove runs with the times of their rounds; plans and measurements stay."""
    from db.rows.runs import delete_runs, list_runs
    from db.store.engine import open_database

    if (study is None) == (not run_ids):
        raise UserError("ID", "missing" if not run_ids else study, "name runs by their ids or by --study NAME")
    with open_database(db_url) as database:
        found = [run.id for run in list_runs(database, study=study) if study is not None or run.id in run_ids]
        missing = [number for number in run_ids if number not in found]
        if missing:
            raise UserError("ID", missing[0], "must be the id of a run (isochunk runs)")
        done = delete_runs(database, found) if yes else 0
    click.echo(f"{done} runs removed" if yes else f"{len(found)} runs would be removed: say --yes")


def _listed(db_url: str | None, run_ids: list[int], limit: int | None) -> list[dict[str, Any]]:
    from db.rows.runs import list_runs
    from db.store.engine import open_database
    from service.use_cases.runs import run_details

    with open_database(db_url, read_only=True) as database:
        chosen = run_ids or [run.id for run in list_runs(database, limit=limit)]
        found = [run_details(database, number) for number in chosen]
    rows = []
    for details in found:
        run, measured = details.run, details.measured
        rows.append(
            {
                "run": run.id, "plan": details.name, "measured_s": run.makespan_s,
                "predicted_s": run.predicted_makespan_s,
                "slower_pct": None if details.error is None else round(100 * details.error, 2),
                "work_s": measured and measured.work_s, "waiting_s": measured and measured.waiting_s,
                "started_at": run.started_at, "status": str(run.status), "mfu": run.mfu, "study": run.study,
                "error": run.error,
            }
        )  # fmt: skip
    return rows


def _show(rows: list[dict[str, Any]], as_json: bool, *, title: str, by_time: bool = False) -> None:
    if by_time:
        rows = sorted(rows, key=lambda row: (row["measured_s"] is None, row["measured_s"] or 0.0))
    if as_json:
        print_json(rows)
    elif rows:
        names = {"measured_s": "measured s", "predicted_s": "predicted s", "slower_pct": "slower %",
                 "work_s": "work s", "waiting_s": "waiting s", "started_at": "started"}  # fmt: skip
        show_table([names.get(name, name) for name in rows[0]], [list(row.values()) for row in rows], title=title)
    else:
        click.echo("no runs yet: isochunk run-plan makes one")

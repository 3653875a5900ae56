"""`isochunk report`: one HTML file of a plan, a run or a hardware, with its pictures in it."""

from __future__ import annotations

from pathlib import Path

import click

from db.errors import UserError
from service.cli.options import db_option


@click.command(name="report")
@click.argument("what", metavar="[PLAN|RUN]", required=False)
@click.option("--hardware", "hardware_id", type=int, metavar="ID", help="Of this hardware of the database instead.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="report.html", show_default=True, metavar="FILE.html",
    help="The file to write.",
)  # fmt: skip
@db_option
def command(what: str | None, hardware_id: int | None, output: Path, db_url: str | None) -> None:
    """Write one page, pictures in it, of a PLAN file, of the run of an id (the newest without), or of a hardware."""
    from db.files.replacement import check_writable, replace_file
    from db.store.engine import open_database
    from service.reports.content import hardware_sections, plan_sections, run_sections
    from service.reports.page import page
    from service.use_cases.runs import run_details
    from tuner.plan.plan import load_plan

    if what is not None and hardware_id is not None:
        raise UserError("--hardware", hardware_id, "give it, a plan or a run")
    check_writable("--output", output)
    if what is not None and not (what.isascii() and what.isdecimal() and len(what) < 10):
        title, sections = f"Plan {Path(what).name}", plan_sections(load_plan(what))
    else:
        with open_database(db_url, read_only=True) as database:
            if hardware_id is not None:
                title, sections = f"Hardware {hardware_id}", hardware_sections(database, hardware_id)
            else:
                details = run_details(database, None if what is None else int(what))
                title, sections = f"Run {details.run.id}: {details.name}", run_sections(database, details)
    replace_file(output, page(title, sections).encode())
    click.echo(f"Wrote {output}")

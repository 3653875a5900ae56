"""`isochunk db`: where the database is, what is in it, and moving a hardware's measurements between machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.options import db_option, json_option
from service.cli.output import print_json, show_table
from service.use_cases.listing import Kept, kept_rows

if TYPE_CHECKING:
    from db.store.engine import Database


@click.group(name="db")
def command() -> None:
    """Show, upgrade, export and import what is kept."""


@command.command()
@db_option
@json_option
def path(db_url: str | None, as_json: bool) -> None:
    """Print where the database is: the file, or the URL of a server."""
    from db.store.location import default_url, parse_url, shown, sqlite_path

    url = parse_url(db_url or default_url())
    file = sqlite_path(url)
    if as_json:
        print_json({"url": shown(url), "path": file, "exists": file.exists() if file else None})
    else:
        click.echo(file or shown(url))


@command.command()
@db_option
@json_option
def upgrade(db_url: str | None, as_json: bool) -> None:
    """Create the database, or bring its tables to this version."""
    from db.store.engine import open_database
    from db.store.schema import HEAD

    with open_database(db_url) as database:
        location, found = database.location, database.found_revision
    if as_json:
        print_json({"url": location, "found_revision": found, "revision": HEAD})
    else:
        was = "created" if found is None else "already there" if found == HEAD else f"upgraded from {found}"
        click.echo(f"{location}: revision {HEAD}, {was}")


@command.command()
@db_option
@json_option
def check(db_url: str | None, as_json: bool) -> None:
    """Read every page and row of the database and say whether it is whole; exit code 2 if it is damaged."""
    from db.store.engine import open_database

    with open_database(db_url, read_only=True) as database:
        database.check()
        location = database.location
    if as_json:
        print_json({"url": location, "whole": True})
    else:
        click.echo(f"{location}: whole")


@command.command(name="list")
@click.argument("what", type=click.Choice([kept.value for kept in Kept]), default=Kept.HARDWARE.value)
@click.option("--hardware", "hardware_id", type=int, metavar="ID", help="Only what belongs to this hardware.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many, newest first."
)
@db_option
@json_option
def list_(what: str, hardware_id: int | None, limit: int, db_url: str | None, as_json: bool) -> None:
    """List what is in the database: hardware (with its ids), measurements, plans, runs or fits."""
    from db.store.engine import open_database

    kept = Kept(what)
    with open_database(db_url, read_only=True) as database:
        rows = kept_rows(database, kept, hardware_id, limit)
        location = database.location
    if as_json:
        print_json(rows)
    elif rows:
        columns = kept.columns
        show_table(columns, [[row[name] for name in columns] for row in rows], title=f"{kept} in {location}")
    else:
        click.echo(f"no {kept} in {location}")


@command.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--hardware", "hardware_id", type=int, metavar="ID", help="Needed when there are several.")
@db_option
@json_option
def export(file: Path, hardware_id: int | None, db_url: str | None, as_json: bool) -> None:
    """Write a hardware and all its measurements to FILE.

    FILE.json and FILE.json.gz can be imported elsewhere. FILE.csv and FILE.csv.gz are a table for a notebook or a
    spreadsheet: a row for each point, a column for each name of its shape.
    """
    from db.rows.archive import export_hardware, export_table
    from db.store.engine import open_database

    with open_database(db_url, read_only=True) as database:
        chosen = _only_hardware(database) if hardware_id is None else hardware_id
        is_table = file.name.removesuffix(".gz").endswith(".csv")
        num_measurements = (export_table if is_table else export_hardware)(database, chosen, file)
    if as_json:
        print_json({"file": file, "hardware_id": chosen, "num_measurements": num_measurements})
    else:
        click.echo(f"{file}: {num_measurements} measurements of hardware {chosen}")


@command.command(name="import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@db_option
@json_option
def import_(file: Path, db_url: str | None, as_json: bool) -> None:
    """Add the measurements in FILE; where both have a row, the newer one stays."""
    from db.rows.archive import import_hardware
    from db.store.engine import open_database

    with open_database(db_url) as database:
        done = import_hardware(database, file)
    if as_json:
        print_json(done._asdict())
    else:
        click.echo(f"hardware {done.hardware_id}: {done.num_new} new measurements, {done.num_updated} updated")


@command.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@json_option
def copy(source: str, target: str, as_json: bool) -> None:
    """Copy everything from the database at URL FROM into the empty one at URL TO.

    From SQLite to PostgreSQL or back, or into a file that is a backup; FROM may be at work meanwhile.
    """
    from db.rows.copy import copy_database
    from db.store.engine import open_database

    def progress(table: str, count: int) -> None:
        click.echo(f"{table}: {count} rows", err=True)

    with open_database(source, read_only=True) as old, open_database(target) as new:
        counts = copy_database(old, new, progress)
        location = new.location
    if as_json:
        print_json({"url": location, "rows": counts})
    else:
        click.echo(f"{location}: {sum(counts.values())} rows")


def _only_hardware(database: Database) -> int:
    from db.errors import UserError
    from db.rows.hardware import list_hardware

    known = list_hardware(database)
    if len(known) != 1:
        choices = "; ".join(f"{row.id} ({row.hardware.device} x{row.hardware.device_count})" for row in known)
        raise UserError("--hardware", "not given", f"must be one of {choices}" if known else "the database is empty")
    return known[0].id

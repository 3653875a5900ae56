"""Options that several commands share."""

from __future__ import annotations

import click

db_option = click.option(
    "--db",
    "db_url",
    metavar="URL",
    envvar="ISOCHUNK_DB",
    help="Database: any SQLAlchemy URL of SQLite or PostgreSQL. [default: a SQLite file in the user's data folder]",
)
stall_option = click.option(
    "--stall-timeout-s",
    type=click.FloatRange(min=1.0),
    help="Fail when no rank moved for so long. [default: 60, or more for rounds that take long]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

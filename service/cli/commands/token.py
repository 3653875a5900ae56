"""`isochunk token`: access tokens of the service, stored as hashes."""

from __future__ import annotations

import click

from db.errors import UserError
from service.cli.options import db_option, json_option
from service.cli.output import print_json, show_table


@click.group(name="token")
def command() -> None:
    """Make, list and revoke access tokens for every service of a database."""


@command.command()
@click.argument("name")
@click.option(
    "--scopes", default="read", show_default=True, metavar="SCOPE,...", help="Of read, plan and run: what it allows."
)
@db_option
@json_option
def new(name: str, scopes: str, db_url: str | None, as_json: bool) -> None:
    """Make a token called NAME and print it once; it cannot be shown again."""
    from db.rows.tokens import save_token
    from db.store.engine import open_database
    from service.http.door.access import Scope, hash_of, random_token

    words = {word.strip() for word in scopes.split(",")}
    if not words <= set(Scope):
        raise UserError("--scopes", scopes, f"must be some of {', '.join(Scope)}, with commas between")
    if not (0 < len(name) <= 100 and name.isprintable()):
        raise UserError("NAME", name, "must be printable, at most 100 characters")
    token = random_token()
    with open_database(db_url) as database:
        number = save_token(database, name, hash_of(token), ",".join(sorted(words)))
    if as_json:
        print_json({"id": number, "name": name, "scopes": sorted(words), "token": token})
    else:
        click.echo(token)


@command.command(name="list")
@db_option
@json_option
def list_(db_url: str | None, as_json: bool) -> None:
    """List tokens: their names and scopes, and which are revoked."""
    from db.rows.tokens import list_tokens
    from db.store.engine import open_database

    with open_database(db_url, read_only=True) as database:
        found = list_tokens(database)
    if as_json:
        print_json(found)
    else:
        rows = [(one.id, one.name, one.scopes, one.created_at, one.revoked_at) for one in found]
        show_table(("id", "name", "scopes", "created_at", "revoked_at"), rows)


@command.command()
@click.argument("token_id", type=int, metavar="ID")
@db_option
def revoke(token_id: int, db_url: str | None) -> None:
    """Revoke the token of ID."""
    from db.rows.tokens import revoke_token
    from db.store.engine import open_database

    with open_database(db_url) as database:
        revoke_token(database, token_id)
    click.echo(f"token {token_id} is revoked")

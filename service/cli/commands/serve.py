"""`isochunk serve`: the planner service, its HTTP API and its page."""

from __future__ import annotations

import click

from db.errors import UserError
from service.cli.options import options_of
from service.http.serve_options import ServeOptions


@click.command(name="serve")
@options_of(ServeOptions)
def command(options: ServeOptions) -> None:
    """Serve plans, what is kept, and jobs: a page for people and an HTTP API for programs.

    Listens on this machine alone unless --host says otherwise. Prints once the address with the token that opens it.
    """
    try:
        from service.http.serve import serve
    except ModuleNotFoundError as error:
        raise UserError("serve", error.name, "needs pip install 'isochunk[service]'") from None
    from service.cli.declared import job_options

    serve(options, job_options())

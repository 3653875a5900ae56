"""The command line: commands are imported when they are called, so that help answers at once."""

from __future__ import annotations

import importlib
import sys

import click

from db.errors import UserError

COMMANDS = {
    "profile": ("service.commands.profile", "Measure a model's kernels and collectives on this machine."),
    "tune": ("service.commands.tune", "Fit the cost model and choose layout, partition and rounds."),
    "run-plan": ("service.commands.run_plan", "Execute a plan and compare it with its prediction."),
    "db": ("service.commands.db", "Look after the profiling database."),
}


class LazyGroup(click.Group):
    """Knows its commands' names and help lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that is called."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="isochunk", prog_name="isochunk")
def cli() -> None:
    """Find, prove and run the fastest chunked-pipeline plan for long-context LLM prefill on the hardware at hand."""


def main() -> None:
    """Run the command line; a user's error is one line and exit code 2."""
    try:
        cli()
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)

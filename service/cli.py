"""The command line: commands are imported when they are called, so that help answers at once."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

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

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt stays one, where click would print an empty line for it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Ended(signal.SIGINT) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="isochunk", prog_name="isochunk")
def cli() -> None:
    """Find, prove and run the fastest chunked-pipeline plan for long-context LLM prefill on the hardware at hand."""


class Ended(BaseException):
    """The process was told to end by a signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"Ended by {signal.Signals(number).name}")


def main() -> None:
    """Run the command line.

    What ends it is one line: a user's error with exit code 2, an interrupt with 130, any other signal with 128 and its
    number.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        code = cli(standalone_mode=False)
    except UserError as error:
        code = _say(f"Error: {error}", 2)
    except click.ClickException as error:
        code = _say(f"Error: {error.format_message()}", error.exit_code)
    except KeyboardInterrupt:  # before or after the command
        code = _say("Interrupted", 128 + signal.SIGINT)
    except Ended as error:
        code = _say("Interrupted" if error.number == signal.SIGINT else str(error), 128 + error.number)
    sys.exit(code or 0)


def _end(number: int, _frame: Any) -> None:
    raise Ended(number)


def _say(line: str, code: int) -> int:
    click.echo(line, err=True)
    return code

"""The command line: commands are imported when they are called, so that help answers at once."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from typing import Any

import click

from db.errors import UserError

COMMANDS = {
    "profile": ("service.cli.commands.profile", "Measure a model's kernels and collectives on this machine."),
    "tune": ("service.cli.commands.tune", "Fit the cost model and choose layout, partition and rounds."),
    "run-plan": ("service.cli.commands.run_plan", "Execute a plan and compare it with its prediction."),
    "plot": ("service.cli.plot", "Draw a plan, a run, or a trace under every policy."),
    "models": ("service.cli.commands.models", "Say which models are run and how, or what one consists of."),
    "runs": ("service.cli.commands.runs", "List, explain, compare and clear runs."),
    "report": ("service.cli.commands.report", "Write one HTML page of a plan, a run or a hardware."),
    "quantize": ("service.cli.checkpoints.quantize", "Make an 8-bit checkpoint of a model, and say what it costs."),
    "prune": (
        "service.cli.checkpoints.prune",
        "Make a smaller checkpoint of a model, and say what it gains.",
    ),
    "train": ("service.cli.checkpoints.train", "Train or distil a checkpoint as a plan lays it out."),
    "export": ("service.cli.commands.export", "Write a plan as another engine's launch files."),
    "compare": ("service.cli.commands.compare", "Put what an engine measured beside a plan's prediction."),
    "serve": ("service.cli.commands.serve", "Serve plans, what is kept, and jobs: a page and an HTTP API."),
    "token": ("service.cli.commands.token", "Make, list and revoke tokens that open the service."),
    "worker": ("service.cli.commands.worker", "Run the service's jobs on this machine."),
    "db": ("service.cli.commands.db", "Look after the profiling database."),
    "completion": ("service.cli.completion", "Let the shell complete commands and options."),
}


# Seconds from a signal to the end at the latest; an interrupted profile still says what it has.
END_WITHIN_S: dict[int, float] = {signal.SIGTERM: 5.0, signal.SIGHUP: 5.0, signal.SIGINT: 15.0}


DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO,
    errno.EMFILE, errno.EPIPE,
}  # fmt: skip
"""Errors that a disk or a folder can cause."""


class LazyGroup(click.Group):
    """A click group that lists its commands' names and help lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that is called."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        server = ctx.params.get("server")
        if server is None:
            return command
        from service.cli.remote import remote

        return remote(cmd_name, command, server)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interrupt stays one, where click would print an empty line for it, and so does a reader
        that has gone away, for which click exits with 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Ended(signal.SIGINT) from None
        except BrokenPipeError:
            raise Ended(signal.SIGPIPE) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="isochunk", prog_name="isochunk")
@click.option("--server", metavar="URL", envvar="ISOCHUNK_SERVER", help="Let the service at this address do it.")
def cli(server: str | None) -> None:
    """Find, prove and run the fastest chunked-pipeline plan for long-context LLM prefill on the hardware at hand."""


class Ended(BaseException):
    """The process received a signal to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


def main() -> None:
    """Run the command line.

    What ends it is one line: a user's error or a disk's with exit code 2, an interrupt with 130, any other signal with
    128 and its number. A reader of the output that has gone away ends it without a word, with 141.
    """
    for number in END_WITHIN_S:
        signal.signal(number, _end)
    try:
        code = cli(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        code = _say(f"Error: {error}", 2)
    except click.ClickException as error:
        code = _say(f"Error: {error.format_message()}", error.exit_code)
    except KeyboardInterrupt:  # before or after the command
        code = _say(_line(signal.SIGINT), 128 + signal.SIGINT)
    except Ended as error:
        code = _reader_gone() if error.number == signal.SIGPIPE else _say(_line(error.number), 128 + error.number)
    except OSError as error:
        code = _disk_failed(error)
    sys.exit(code or 0)


def _disk_failed(error: OSError) -> int:
    """Say which file cannot be read or written, or that the output cannot; what no disk can cause is raised again."""
    if error.errno not in DISK_ERRORS:
        raise error
    if error.filename is None:
        _drop_output()
    if isinstance(error, BrokenPipeError):
        return _reader_gone()
    return _say(f"Error: {UserError(error.filename or 'output', '', f'{error.strerror}')}", 2)


def _drop_output() -> None:
    """What is left in the buffer must not fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _reader_gone() -> int:
    _drop_output()
    return 128 + signal.SIGPIPE


def _end(number: int, frame: Any) -> None:
    """Raise what ends the command, and exit in any case, because code that is being imported may catch everything."""
    backstop = threading.Timer(END_WITHIN_S[number], _leave, [number])
    backstop.daemon = True
    backstop.start()
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    raise Ended(number)


def _leave(number: int) -> None:
    _say(_line(number), 128 + number)
    os._exit(128 + number)  # ranks end with this process


def _line(number: int) -> str:
    return "Interrupted" if number == signal.SIGINT else f"Ended by {signal.Signals(number).name}"


def _say(line: str, code: int) -> int:
    click.echo(line, err=True)
    return code

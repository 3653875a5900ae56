"""The options of commands as data, for the service's jobs, which do not call click."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from service.jobs.command import CommandOption
from service.jobs.job import JobKind

# Set by the service or the worker: callers name no files, and results are stored in the service's database.
_LEFT_OUT = frozenset({"as_json", "db_url", "model", "plan", "weights", "output", "calibration", "held_out"})
_MODULES = {
    JobKind.PROFILE: "service.cli.commands.profile",
    JobKind.TUNE: "service.cli.commands.tune",
    JobKind.RUN_PLAN: "service.cli.commands.run_plan",
    JobKind.QUANTIZE: "service.cli.checkpoints.quantize",
}


def job_options() -> dict[JobKind, tuple[CommandOption, ...]]:
    """The options of the commands that jobs run, those that name files left out."""
    return {kind: declared(import_module(module).command) for kind, module in _MODULES.items()}


def declared(command: click.Command) -> tuple[CommandOption, ...]:
    """The options of a command."""
    found = []
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.name in _LEFT_OUT:
            continue
        if isinstance(parameter.type, click.Path | click.File):
            continue
        found.append(_declared(parameter))
    return tuple(found)


def _declared(option: click.Option) -> CommandOption:
    kind: type = str
    least: float | None = None
    strictly = False
    if option.is_flag:
        kind = bool
    elif isinstance(option.type, click.types.IntParamType):
        kind = int
    elif isinstance(option.type, click.types.FloatParamType):
        kind = float
    if isinstance(option.type, click.IntRange | click.FloatRange):
        least, strictly = option.type.min, option.type.min_open
    choices: tuple[Any, ...] = tuple(option.type.choices) if isinstance(option.type, click.Choice) else ()
    assert option.name is not None
    return CommandOption(
        name=option.name,
        flag=option.opts[-1],
        off_flag=option.secondary_opts[-1] if option.secondary_opts else None,
        kind=kind,
        help=option.help or "",
        choices=choices,
        least=least,
        strictly=strictly,
    )

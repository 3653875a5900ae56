"""Makes click options from the fields of an options class; options shared by commands."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import click

from db.errors import UserError, cut
from service.use_cases.options import DB_HELP, DB_VARIABLE, about_field, flags_of

CONFIG = "--config"
F = TypeVar("F", bound=Callable[..., Any])

db_option = click.option("--db", "db_url", metavar="URL", envvar=DB_VARIABLE, help=DB_HELP)
stall_option = click.option(
    "--stall-timeout-s",
    type=click.FloatRange(min=1.0),
    help="Fail when no rank moved for so long. [default: 60, or more for rounds that take long]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def read_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """Use the table of the command's name in a TOML file as defaults, and print that it is used."""
    if path is None:
        return
    from db.files.documents import read_toml

    name = str(context.command.name)
    table = read_toml(path, field=CONFIG).get(name)
    if not isinstance(table, dict):
        raise UserError(CONFIG, path, f"must have a table [{name}] with the command's options")
    known = {_word(parameter): parameter for parameter in context.command.params if parameter.name != "config"}
    chosen: dict[str, Any] = {}
    for key, value in table.items():
        parameter = known.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise UserError(f"{CONFIG}: {name}.{key}", "unknown", f"must be one of {', '.join(sorted(known))}")
        is_flag = isinstance(parameter, click.Option) and parameter.is_flag
        if isinstance(value, dict) or isinstance(value, bool) != is_flag:
            raise UserError(f"{CONFIG}: {name}.{key}", value, "must be true or false" if is_flag else "must be a value")
        chosen[parameter.name] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **chosen}
    click.echo(
        f"Options from {cut(path)}: {cut(', '.join(f'{key} {value}' for key, value in chosen.items()), 400)}", err=True
    )


config_option = click.option(
    CONFIG, type=click.Path(path_type=Path), metavar="FILE.toml", is_eager=True, expose_value=False,
    callback=read_config, help="Options from this file's table of the command's name.",
)  # fmt: skip


def _word(parameter: click.Parameter) -> str:
    """The name of an option in a file: as on the command line, without dashes."""
    if isinstance(parameter, click.Argument):
        return str(parameter.name)
    return max(parameter.opts, key=len).removeprefix("--")


def options_of(cls: type) -> Callable[[F], F]:
    """Give a command all options of a class; it is called with one, `options`."""
    types_of = get_type_hints(cls)

    def decorate(function: F) -> F:
        def called(**values: Any) -> Any:
            chosen = {each.name: values.pop(each.name) for each in fields(cls)}
            return function(options=cls(**chosen), **values)

        decorated: Any = called
        decorated.__doc__ = function.__doc__
        decorated.__click_params__ = list(getattr(function, "__click_params__", []))
        for each in reversed(fields(cls)):
            _declared(each, types_of[each.name])(decorated)
        return cast(F, decorated)

    return decorate


def _declared(each: Field[Any], annotation: Any) -> Callable[[F], F]:
    """click's decorator for a field."""
    about, kind = about_field(each), _plain(annotation)
    accepted: Any = click.Choice(about.choices) if about.choices else kind
    if about.is_file:
        accepted = click.Path(dir_okay=False)
    flags = flags_of(each)
    if not flags[0].startswith("-"):
        return click.argument(each.name, type=accepted, required=False, metavar=f"[{flags[0]}]")
    if kind is bool:
        off = "/--no-" + flags[-1].removeprefix("--") if each.default else ""
        return click.option(flags[-1] + off, each.name, is_flag=True, default=each.default, help=about.help)
    return click.option(
        *flags, each.name, type=accepted, default=each.default, metavar=about.metavar, envvar=about.variable,
        show_default=each.default is not None, help=about.help,
    )  # fmt: skip


def _plain(annotation: Any) -> Any:
    """The type of an option that may be missing."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation

"""click's options, made of the fields of an options class, and those that commands share."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from service.use_cases.options import DB_HELP, DB_VARIABLE, about_field, flags_of

F = TypeVar("F", bound=Callable[..., Any])

db_option = click.option("--db", "db_url", metavar="URL", envvar=DB_VARIABLE, help=DB_HELP)
stall_option = click.option(
    "--stall-timeout-s",
    type=click.FloatRange(min=1.0),
    help="Fail when no rank moved for so long. [default: 60, or more for rounds that take long]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def options_of(cls: type) -> Callable[[F], F]:
    """Give a command all options of a class; it is called with one, `options`."""
    types_of = get_type_hints(cls)

    def decorate(function: F) -> F:
        def called(**values: Any) -> Any:
            chosen = {each.name: values.pop(each.name) for each in fields(cls)}
            return function(options=cls(**chosen), **values)

        called.__doc__ = function.__doc__
        called.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
        for each in reversed(fields(cls)):
            _declared(each, types_of[each.name])(called)
        return called  # type: ignore[return-value]

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

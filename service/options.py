"""Options declared once, as fields of a dataclass that carry their help and checks; click's options are made of them.

@dataclass(frozen=True, slots=True, kw_only=True)
class SomeOptions:
    world_size: int | None = option(None, "Ranks to plan for.", above=0)

    def __post_init__(self) -> None:
        check_options(self)

@click.command()
@options_of(SomeOptions)
def command(options: SomeOptions) -> None: ...
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from db.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
DB_HELP = "Database: any SQLAlchemy URL of SQLite or PostgreSQL. [default: a SQLite file in the user's data folder]"
DB_VARIABLE = "ISOCHUNK_DB"
KEY = "option"

db_option = click.option("--db", "db_url", metavar="URL", envvar=DB_VARIABLE, help=DB_HELP)
stall_option = click.option(
    "--stall-timeout-s",
    type=click.FloatRange(min=1.0),
    help="Fail when no rank moved for so long. [default: 60, or more for rounds that take long]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a field of options says of itself beside its type and its default."""

    help: str
    flags: tuple[str, ...]
    """As on the command line; one without dashes is an argument. Empty: the field's name."""
    metavar: str | None
    choices: tuple[str, ...]
    above: float | None
    """The value must be more than this."""
    is_file: bool
    variable: str | None
    """Environment variable that gives the value where the command line does not."""


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    is_file: bool = False,
    variable: str | None = None,
) -> Any:
    """A field of an options class."""
    about = Option(
        help=help, flags=flags, metavar=metavar, choices=choices, above=above, is_file=is_file, variable=variable
    )
    return field(default=default, metadata={KEY: about})


def db_url() -> Any:
    """The field of the database that a command uses."""
    return option(None, DB_HELP, flags=("--db",), metavar="URL", variable=DB_VARIABLE)


def flag_of(options: object, name: str) -> str:
    """How a field is called on the command line."""
    return next(_flags(each)[-1] for each in fields(options) if each.name == name)  # type: ignore[arg-type]


def check_options(options: object) -> None:
    """Raise UserError for the first field whose value its declaration does not allow."""
    for each in fields(options):  # type: ignore[arg-type]
        about, value = _about(each), getattr(options, each.name)
        if value is None:
            continue
        if about.above is not None and not value > about.above:  # NaN is not either
            raise UserError(_flags(each)[-1], value, f"must be more than {about.above:g}")
        if about.choices and value not in about.choices:
            raise UserError(_flags(each)[-1], value, f"must be one of {', '.join(about.choices)}")


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
    about, kind = _about(each), _plain(annotation)
    accepted: Any = click.Choice(about.choices) if about.choices else kind
    if about.is_file:
        accepted = click.Path(dir_okay=False)
    flags = _flags(each)
    if not flags[0].startswith("-"):
        return click.argument(each.name, type=accepted, required=False, metavar=f"[{flags[0]}]")
    if kind is bool:
        off = "/--no-" + flags[-1].removeprefix("--") if each.default else ""
        return click.option(flags[-1] + off, each.name, is_flag=True, default=each.default, help=about.help)
    return click.option(
        *flags, each.name, type=accepted, default=each.default, metavar=about.metavar, envvar=about.variable,
        show_default=each.default is not None, help=about.help,
    )  # fmt: skip


def _about(each: Field[Any]) -> Option:
    about: Option = each.metadata[KEY]
    return about


def _flags(each: Field[Any]) -> tuple[str, ...]:
    return _about(each).flags or ("--" + each.name.replace("_", "-"),)


def _plain(annotation: Any) -> Any:
    """The type of an option that may be missing."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation

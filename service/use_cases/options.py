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

import shlex
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from db.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound=Callable[..., Any])
DB_HELP = "Database: any SQLAlchemy URL of SQLite or PostgreSQL. [default: a SQLite file in the user's data folder]"
DB_VARIABLE = "ISOCHUNK_DB"
KEY = "option"


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
    words = tuple(map(str, choices))  # of members of an enum click takes the names
    about = Option(
        help=help, flags=flags, metavar=metavar, choices=words, above=above, is_file=is_file, variable=variable
    )
    return field(default=default, metadata={KEY: about})


def db_url() -> Any:
    """The field of the database that a command uses."""
    return option(None, DB_HELP, flags=("--db",), metavar="URL", variable=DB_VARIABLE)


def flag_of(options: DataclassInstance, name: str) -> str:
    """How a field is called on the command line."""
    return next(flags_of(each)[-1] for each in fields(options) if each.name == name)


def check_options(options: DataclassInstance) -> None:
    """Raise UserError for the first field whose value its declaration does not allow."""
    for each in fields(options):
        about, value = about_field(each), getattr(options, each.name)
        if value is None:
            continue
        if about.above is not None and not value > about.above:  # NaN is not either
            raise UserError(flags_of(each)[-1], value, f"must be more than {about.above:g}")
        if about.choices and value not in about.choices:
            raise UserError(flags_of(each)[-1], value, f"must be one of {', '.join(about.choices)}")


def about_field(each: Field[Any]) -> Option:
    """What a field says of itself."""
    about: Option = each.metadata[KEY]
    return about


def flags_of(each: Field[Any]) -> tuple[str, ...]:
    """How a field is called on the command line, in all its forms."""
    return about_field(each).flags or ("--" + each.name.replace("_", "-"),)


def chosen(options: DataclassInstance) -> dict[str, Any]:
    """The fields that are not at their defaults; where the database is, which may hold a password, is left out."""
    values = ((each, getattr(options, each.name)) for each in fields(options))
    return {each.name: value for each, value in values if value != each.default and each.name != "db_url"}


def command_line(name: str, options: DataclassInstance, **others: Any) -> str:
    """The command with the options that are not at their defaults; others: fields with other values."""
    words, arguments = [], []
    given = {"db_url": getattr(options, "db_url", None), **chosen(options), **others}
    for each in fields(options):
        value, flag = given.get(each.name), flags_of(each)[-1]
        if value is None:
            continue
        if not flag.startswith("-"):
            arguments.append(str(value))
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, str(value)]
    return shlex.join(["isochunk", name, *arguments, *words])

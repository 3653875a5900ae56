"""Request bodies made from options classes, so that the command line and HTTP accept the same options.

Options that name files are left out: what they hold comes in the body itself, and no path comes from a caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from service.jobs.command import CommandOption
from service.use_cases.options import about_field

_MOST_TEXT = 100_000
MOST_NUMBER = 2**40


def body_of(cls: type, name: str, *, without: Collection[str] = (), **more: Any) -> type[BaseModel]:
    """The body that sets an options class's fields.

    without: fields that the service sets itself, beside all that name files. more: fields that stand beside them.
    """
    kinds = get_type_hints(cls)
    declared: dict[str, Any] = {}
    for each in fields(cls):
        about = about_field(each)
        if about.is_file or each.name in without:
            continue
        kind: Any = kinds[each.name]
        if about.choices:
            kind = Literal[about.choices] if each.default is not None else Literal[about.choices] | None
        numeric = kind in (int, float, int | None, float | None)
        limits: dict[str, Any] = {"gt": about.above} if about.above is not None else {}
        if numeric:
            limits |= {"le": MOST_NUMBER} | ({} if "gt" in limits else {"ge": -MOST_NUMBER})
        if kind in (str, str | None):
            limits["max_length"] = _MOST_TEXT
        declared[each.name] = (kind, Field(each.default, description=about.help, **limits))
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    body: type[BaseModel] = create_model(name, __config__=config, **declared, **more)
    return body


def body_of_command(options: Iterable[CommandOption], name: str) -> type[BaseModel]:
    """The body that sets a command's options; what is left out is the command's own default."""
    declared: dict[str, Any] = {}
    for option in options:
        kind: Any = Literal[option.choices] if option.choices else option.kind
        limits: dict[str, Any] = {}
        if option.kind in (int, float):
            limits = {
                "le": MOST_NUMBER,
                "gt" if option.strictly else "ge": -MOST_NUMBER if option.least is None else option.least,
            }
        elif option.kind is str and not option.choices:
            limits = {"max_length": _MOST_TEXT, "pattern": r"^[^\x00-\x1f]*$"}
        declared[option.name] = (kind | None, Field(None, description=option.help, **limits))
    body: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **declared)
    return body

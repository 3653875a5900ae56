"""Options of a command as jobs store them, and the same as words of a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOption:
    """What a command says of one of its options."""

    name: str
    flag: str
    off_flag: str | None
    """Of a switch that is on unless it is turned off."""
    kind: type
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    strictly: bool = False
    """The value must be more than `least`."""


def flags_for(options: Iterable[CommandOption], values: Mapping[str, Any]) -> tuple[str, ...]:
    """The words for the values that are given; each is one word, so that no value reads as an option."""
    words = []
    for option in options:
        value = values.get(option.name)
        if value is None:
            continue
        if option.kind is bool:
            word = option.flag if value else option.off_flag
            words += [word] if word else []
        else:
            words.append(f"{option.flag}={value}")
    return tuple(words)

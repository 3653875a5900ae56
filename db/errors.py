"""The one error a user's input can cause, shared by every folder because all of them import db."""

from __future__ import annotations

MAX_SHOWN = 80
_MAX_FIELD = 160
_MAX_ALLOWED = 2000


class UserError(ValueError):
    """Bad input, as one printable line: the field, the value found there, and what is allowed.

    The command line prints it without a traceback and exits with code 2. It is a ValueError, so that pydantic, which
    calls the checks of our dataclasses, says where in a file it was raised.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = cut(value)
        rest = f"{shown}; {cut(allowed, _MAX_ALLOWED)}" if shown else cut(allowed, _MAX_ALLOWED)
        super().__init__(f"{cut(field, _MAX_FIELD)}: {rest}")
        self.field = field
        self.value = value
        self.allowed = allowed


def cut(value: object, most: int = MAX_SHOWN) -> str:
    """The value's text as one printable line; a text of more than `most` characters keeps its start and its end."""
    try:
        text = str(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number of thousands of digits"
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[3 - most // 2 :]}"
    return printable(text)


def printable(text: str) -> str:
    """The text with each character that is not printable written as its escape: a terminal must not obey a file."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

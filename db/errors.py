"""The one error a user's input can cause, shared by every folder because all of them import db."""

from __future__ import annotations

MAX_SHOWN = 80


class UserError(Exception):
    """Bad input, told in one line: the field, the value found there, and what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = cut(value)
        super().__init__(f"{field}: {shown}; {allowed}" if shown else f"{field}: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


def cut(value: object) -> str:
    """The value's text as one printable line; a long one keeps its start and its end."""
    text = str(value)
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]}...{text[3 - MAX_SHOWN // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

"""The one error a user's input can cause, shared by every folder because all of them import db."""

from __future__ import annotations


class UserError(Exception):
    """Bad input, told in one line: the field, the value found there, and what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = str(value)
        super().__init__(f"{field}: {shown}; {allowed}" if shown else f"{field}: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

"""Whole numbers in options' texts."""

from __future__ import annotations

from db.errors import UserError


def whole_number(field: str, text: str, *, least: int = 1, most: int) -> int:
    """The number that a text of plain digits means. Raises UserError unless it is from `least` to `most`."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()):
        raise UserError(field, text, f"must be a whole number from {least} to {most}")
    digits = digits.lstrip("0") or "0"  # thousands of digits are more than Python converts
    if len(digits) > len(str(most)) or not least <= int(digits) <= most:
        raise UserError(field, text, f"must be from {least} to {most}")
    return int(digits)

"""Parses whole numbers given as text in options."""

from __future__ import annotations

from db.errors import UserError


def whole_number(field: str, text: str, *, least: int = 1, most: int) -> int:
    """Parse a text of plain digits. Raises UserError unless the number is from `least` to `most`."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()):
        raise UserError(field, text, f"must be a whole number from {least} to {most}")
    digits = digits.lstrip("0") or "0"  # thousands of digits are more than Python converts
    if len(digits) > len(str(most)) or not least <= int(digits) <= most:
        raise UserError(field, text, f"must be from {least} to {most}")
    return int(digits)

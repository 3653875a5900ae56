"""Parses whole numbers and shares given as text in options."""

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


def share(field: str, text: str, *, or_word: str = "") -> float:
    """Parse a share, `0.5%` or `0.005`. Raises UserError unless it is from 0 to 1; `or_word` is allowed, too."""
    words = text.strip()
    try:
        found = float(words.removesuffix("%")) / (100.0 if words.endswith("%") else 1.0)
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= 1.0:  # NaN is not either
        other = f", or {or_word}" if or_word else ""
        raise UserError(field, text, f"must be a share such as 0.5% or 0.005, at most 100%{other}")
    return found

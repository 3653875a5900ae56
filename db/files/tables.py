"""Reads CSV files of users line by line, within the same limits as JSON lines."""

from __future__ import annotations

import codecs
import csv
from itertools import islice
from pathlib import Path

from db.errors import UserError, cut
from db.files.documents import MAX_LINES, MAX_LINES_BYTES, MOST_BLANK, Line, limited_lines, opened, unpacked


def first_line(path: str | Path, *, field: str = "file", max_bytes: int = 1 << 16) -> str:
    """The first line, gzipped or plain, that is not blank, to detect a format; cut after a fixed number of bytes.

    Raises UserError for bytes that are no text and for a pipe, which cannot be read again.
    """
    with opened(Path(path), field) as packed:
        if not packed.seekable():
            raise UserError(field, path, "must be a file, for it is read twice; a pipe is not")
        file = unpacked(packed)
        lines = islice(iter(lambda: file.readline(max_bytes), b""), MOST_BLANK)
        line = next((line for line in lines if line.strip()), b"")
    try:  # a character may be cut
        return codecs.getincrementaldecoder("utf-8-sig")().decode(line).strip()
    except UnicodeDecodeError as error:
        raise UserError(field, path, f"must be UTF-8 text, gzipped or plain (byte {error.start} is not)") from None


def read_csv(
    path: str | Path, *, field: str = "file", most_lines: int | None = None, max_bytes: int = MAX_LINES_BYTES
) -> list[Line[dict[str, str]]]:
    """The rows of a CSV file as {column: text}, by its first line's names; blank lines are left out.

    most_lines: read only so many rows. Raises UserError naming the file, or the line that has another number of fields.
    """
    path = Path(path)
    found: list[Line[dict[str, str]]] = []
    names: list[str] = []
    for number, line in limited_lines(path, field, max_bytes):
        place = f"{cut(path)}: line {number}"
        cells = [cell.strip() for cell in _cells(line, place)]
        if not names:
            names = cells
            continue
        if len(cells) != len(names):
            raise UserError(place, f"{len(cells)} fields", f"{len(names)} are needed, as the first line names")
        if len(found) == (most_lines or MAX_LINES):
            if most_lines is not None:
                break
            raise UserError(field, path, f"must have at most {MAX_LINES} lines")
        found.append(Line(number, place, dict(zip(names, cells, strict=True))))
    return found


def _cells(line: bytes, place: str) -> list[str]:
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError:
        raise UserError(place, "bytes", "must be UTF-8 text") from None
    try:
        return next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration) as error:
        raise UserError(place, text, f"must be a line of CSV ({error})") from None

"""Reads files of users (JSON, JSON lines, TOML, text) within limits; every module reads such files through this one.

A file is read up to its limit, must be UTF-8 and JSON without repeated keys, and holds only what can be written again:
finite numbers, texts without lone surrogates, nesting that every later step can follow. `parse` then gives its content
a type. Whatever is wrong is a UserError that names the file, the line or the path of keys, and what is allowed.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple, TypeVar, cast

from db.errors import UserError, cut
from db.files.json_text import MAX_DEPTH, key_path, parse_json
from db.files.replacement import replace_file

if TYPE_CHECKING:
    from pydantic_core import SchemaValidator

MAX_BYTES = 32 << 20
"""Of a JSON file, unpacked."""
MAX_LINES_BYTES = 128 << 20
"""Of a file of JSON lines: a prompt of a million tokens takes some 7 MB."""
MAX_LINES = 100_000
MOST_BLANK = 1_000_000
"""Lines in all, blank ones included: a few KB of gzip hold a hundred million."""
_MIB = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_WORDS = {
    "missing": "a value is needed",
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "bool_type": "true or false is needed",
    "string_type": "a string is needed",
    "tuple_type": "a list is needed",
    "list_type": "a list is needed",
    "mapping_type": "an object is needed",
    "dict_type": "an object is needed",
    "dataclass_type": "an object is needed",
}
_UNION_TAGS = ("int", "str", "float", "bool")
"""What pydantic adds to the path of a value that may be of several types."""

T = TypeVar("T")


class Line(NamedTuple, Generic[T]):
    """A line of a file of JSON lines."""

    number: int  # from 1
    place: str  # what errors name: `<path>: line 7`
    content: T


def read_json(path: str | Path, *, field: str = "file", max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file, gzipped or plain.

    field: the option or argument that named the file, for the errors.
    """
    path = Path(path)
    with opened(path, field) as file:
        data = file.read(max_bytes + 1)
        if data.startswith(_GZIP_MAGIC) and len(data) <= max_bytes:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(field, path, f"must be at most {max_bytes // _MIB} MiB, unpacked")
    return parse_json(data, field, path)


def read_utf8(path: str | Path, *, field: str = "file", max_bytes: int = MAX_BYTES) -> str:
    """The content of a text file in UTF-8."""
    path = Path(path)
    with opened(path, field) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(field, path, f"must be at most {max_bytes // _MIB} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(field, path, f"must be UTF-8 text (byte {error.start} is not)") from None


def read_toml(path: str | Path, *, field: str = "file") -> dict[str, Any]:
    """The content of a TOML file: tables of numbers, texts, lists and true or false."""
    import tomllib

    try:
        content = tomllib.loads(read_utf8(path, field=field, max_bytes=_MIB))
        return cast(dict[str, Any], parse_json(json.dumps(content).encode(), field, path))
    except RecursionError:
        raise UserError(field, path, f"must be TOML nested at most {MAX_DEPTH} deep") from None
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # a TypeError: a date
        raise UserError(field, path, f"must be TOML ({error})") from None


def read_json_lines(
    path: str | Path,
    model: type[T],
    *,
    field: str = "file",
    most_lines: int | None = None,
    max_bytes: int = MAX_LINES_BYTES,
) -> list[Line[T]]:
    """The lines of a file of JSON lines that are not blank.

    most_lines: read only so many.
    """
    path = Path(path)
    found: list[Line[T]] = []
    for number, line in limited_lines(path, field, max_bytes):
        if len(found) == most_lines:
            break
        if len(found) == MAX_LINES:
            raise UserError(field, path, f"must have at most {MAX_LINES} lines")
        place = f"{cut(path)}: line {number}"
        content = parse_json(line, place, "")
        with located(place):
            found.append(Line(number, place, parse(model, content)))
    return found


def limited_lines(path: Path, field: str, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines, gzipped or plain, that are not blank, with their numbers. Raises UserError for a file of more than
    `max_bytes`, unpacked."""
    left = max_bytes
    with opened(path, field) as packed:
        file = unpacked(packed)
        for number in count(1):
            line = file.readline(left + 1)
            left -= len(line)
            if left < 0:
                raise UserError(field, path, f"must be at most {max_bytes // _MIB} MiB, unpacked")
            if not line:
                return
            if number > MOST_BLANK:
                raise UserError(field, path, f"must have at most {MOST_BLANK} lines, blank ones included")
            if line.strip():
                yield number, line


def write_json(path: str | Path, content: object) -> None:
    """Replace a JSON file atomically: a reader sees the old content or the new, never a part."""
    replace_file(Path(path), (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def of_schema(content: object, *schemas: str) -> dict[str, Any]:
    """The content of a file if it is an object of one of these schemas, each with its version."""
    names = " or ".join(schemas)
    if not isinstance(content, dict):
        raise UserError("content", content, f"an object of schema {names} is needed")
    if content.get("schema") not in schemas:
        raise UserError("schema", content.get("schema", "missing"), f"{names} is the version read here")
    return content


def parse(model: type[T], content: object) -> T:
    """Convert a file's content to `model`: a dataclass or any type that pydantic supports.

    Strict: a number is no text and true is no number. Fields that the model does not have are ignored.
    """
    from pydantic import ValidationError

    try:
        found: T = _validator(cast(Hashable, model)).validate_json(json.dumps(content, ensure_ascii=False), strict=True)
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    keys = first["loc"]
    where = key_path(keys[:-1] if keys and keys[-1] in _UNION_TAGS and first["type"] in _WORDS else keys)
    cause = first["ctx"]["error"] if first["type"] == "value_error" else None
    if isinstance(cause, UserError):
        between = "." if where and not cause.field.startswith("[") else ""
        raise UserError(f"{where}{between}{cause.field}", cause.value, cause.allowed)
    if cause is not None:  # a check of the whole object: its message names the fields
        raise UserError(where or "content", "", str(cause))
    value = "missing" if first["type"] == "missing" or first["input"] is None else first["input"]
    allowed = _WORDS.get(first["type"], first["msg"])
    if isinstance(value, str) and value.strip("+-").replace(".", "", 1).isdecimal():
        value = json.dumps(value)  # a text where a number is needed
    raise UserError(where or "content", value, allowed)


@contextmanager
def located(place: str | Path) -> Iterator[None]:
    """Prefix the field of a UserError raised in this block with the file, or with a line of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{cut(place)}: {error.field}", error.value, error.allowed) from None


@contextmanager
def opened(path: Path, field: str) -> Iterator[BinaryIO]:
    """Open a file for reading; errors of the file in this block become a UserError that names it."""
    try:
        with path.open("rb") as file:
            yield file
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # a ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(field, path, f"must be a readable file ({reason})") from None


def unpacked(file: BinaryIO) -> BinaryIO:
    """The content of a file that is gzipped or not, from here on."""
    assert isinstance(file, io.BufferedReader)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if file.peek(2).startswith(_GZIP_MAGIC) else file


@cache
def _validator(model: Any) -> SchemaValidator:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    return SchemaValidator(_failing_fast(TypeAdapter(model).core_schema))


def _failing_fast(schema: Any) -> Any:
    """The schema whose lists stop at their first bad item: a million bad items would be a gigabyte of errors."""
    if isinstance(schema, list):
        return [_failing_fast(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    stops = {"fail_fast": True} if schema.get("type") in ("list", "tuple") else {}
    return {key: _failing_fast(value) for key, value in schema.items()} | stops

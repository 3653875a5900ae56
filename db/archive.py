"""A hardware's measurements as one portable file (`isochunk.profile/1`): profile a cluster, plan on a laptop."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from db.engine import Database
from db.errors import UserError, cut
from db.files import replace_file
from db.hardware import Hardware, get_hardware, hardware_id
from db.measurements import Measurement, MeasurementKey, from_row, load_measurements, write_measurements
from db.provenance import code_version
from db.tables import MeasurementRow, Source

SCHEMA = "isochunk.profile/1"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MAX_TEXT = 1000
_MAX_SIZE = 2**40
_MAX_US = 1e15
_FIRST_YEAR, _LAST_YEAR = 1970, 9000
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the file holds."""

    hardware: Hardware
    measurements: list[Measurement]


class Imported(NamedTuple):
    """What an import changed."""

    hardware_id: int
    num_new: int
    num_updated: int


def export_hardware(database: Database, hardware_id: int, path: Path | str) -> int:
    """Write a hardware and its measurements to a file, gzipped if its name ends in .gz; return how many there are.

    A line a measurement, in a fixed order: the same rows give the same bytes. Raises UserError for an unknown
    hardware and a file that cannot be written.
    """
    hardware = get_hardware(database, hardware_id)
    measurements = load_measurements(database, hardware)
    rows = ",\n  ".join(json.dumps(_portable(row), allow_nan=False) for row in measurements)
    text = (
        f'{{"schema": "{SCHEMA}",\n'
        f' "code_version": {json.dumps(code_version())},\n'
        f' "hardware": {json.dumps(asdict(hardware))},\n'
        f' "measurements": [\n  {rows}\n ]}}\n'
    )
    data = text.encode()
    path = Path(path)
    replace_file(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return len(measurements)


def import_hardware(database: Database, path: Path | str) -> Imported:
    """Keep what a file of `export_hardware` holds, all or nothing; of two rows of one key the newer stands.

    Importing a file again changes nothing. Raises UserError for a file of another schema version and names a
    malformed row.
    """
    profile = read_profile(Path(path))
    with database.session() as session:
        owner = hardware_id(session, profile.hardware)
        stored = session.scalars(select(MeasurementRow).where(MeasurementRow.hardware_id == owner))
        kept = {from_row(row).key: row.measured_at for row in stored}
        new = [row for row in profile.measurements if row.key not in kept]
        newer = [row for row in profile.measurements if row.key in kept and row.measured_at > kept[row.key]]
        write_measurements(session, owner, (replace(row, source=Source.IMPORT) for row in new + newer))
    return Imported(owner, len(new), len(newer))


def read_profile(path: Path) -> Profile:
    """Read and check a file. Raises UserError naming the field, the value and what is allowed."""
    from pydantic import TypeAdapter, ValidationError

    content = _read_json(path)
    schema = content.get("schema")
    if schema != SCHEMA:
        raise UserError(f"{path}: schema", schema, f"must be {SCHEMA}")
    try:
        profile = TypeAdapter(Profile).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{cut(part)}" for part in first["loc"]).lstrip(".")
        if first["type"] == "value_error":  # the message names the fields; the input is the whole row
            raise UserError(f"{path}: {where}", "", first["msg"].removeprefix("Value error, ")) from None
        value = "missing" if first["type"] == "missing" else json.dumps(first["input"], default=str)
        raise UserError(f"{path}: {where}", value, first["msg"]) from None
    _check_limits(f"{path}: hardware", profile.hardware)
    for index, row in enumerate(profile.measurements):
        _check_limits(f"{path}: measurements[{index}]", row)
    first_at: dict[MeasurementKey, int] = {}
    for index, row in enumerate(profile.measurements):
        if first_at.setdefault(row.key, index) != index:
            where = f"{path}: measurements[{index}]"
            raise UserError(where, ", ".join(map(str, row.key)), f"must not repeat measurements[{first_at[row.key]}]")
    return profile


def _check_limits(where: str, row: Hardware | Measurement) -> None:
    """Raise UserError for a value that a database cannot keep, or that no measurement can be."""
    for field in fields(row):
        name, value = field.name, getattr(row, field.name)
        if name == "op" and not _WORD.fullmatch(value):
            raise UserError(f"{where}.{name}", value, "must be a word of at most 64 letters, digits, '_', '-' and '.'")
        if name == "shape":
            for size, number in value.items():
                if not 0 <= number <= _MAX_SIZE:
                    raise UserError(f"{where}.shape.{cut(size)}", number, f"must be from 0 to {_MAX_SIZE}")
        elif name == "measured_at" and not _FIRST_YEAR <= value.year <= _LAST_YEAR:
            raise UserError(f"{where}.{name}", value, f"must be of a year from {_FIRST_YEAR} to {_LAST_YEAR}")
        elif isinstance(value, str) and (len(value) > _MAX_TEXT or not value.isprintable()):
            raise UserError(f"{where}.{name}", value, f"must be printable text of at most {_MAX_TEXT} characters")
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            least, most = (0, 2**63 - 1) if name == "memory_bytes" else (1, 2**31 - 1)
            if not least <= value <= most:
                raise UserError(f"{where}.{name}", value, f"must be from {least} to {most}")
        elif isinstance(value, float) and not value <= _MAX_US:
            raise UserError(f"{where}.{name}", value, f"must be at most {_MAX_US:g}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("file", path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError("file", path, f"must be JSON of {SCHEMA} ({error})") from None
    if not isinstance(content, dict):
        raise UserError("file", path, f"must be JSON of {SCHEMA}")
    return content


def _portable(row: Measurement) -> dict[str, Any]:
    values = asdict(row) | {"measured_at": row.measured_at.isoformat()}
    del values["source"]  # whoever imports it knows that it was imported
    return values

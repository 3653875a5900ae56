"""A hardware's measurements as one portable file (`isochunk.profile/1`): profile a cluster, plan on a laptop."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from db.errors import UserError, cut
from db.files.documents import located, of_schema, parse, read_json
from db.files.replacement import replace_file
from db.rows.hardware import Hardware, get_hardware, hardware_id
from db.rows.measurements import Measurement, MeasurementKey, from_row, load_measurements, write_measurements
from db.store.engine import Database
from db.store.provenance import code_version
from db.store.tables import MeasurementRow, Source

SCHEMA = "isochunk.profile/1"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_MAX_TEXT = 1000
_MAX_SIZE = 2**40
_MAX_US = 1e15
_FIRST_YEAR, _LAST_YEAR = 1970, 9000
_LEAST_US = 0.01
_MOST_FLOPS = 1e17  # one device; the fastest of 2026 have 2e16 in their narrowest format


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The file's content: one hardware and its measurements."""

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
    _write(Path(path), text)
    return len(measurements)


def export_table(database: Database, hardware_id: int, path: Path | str) -> int:
    """Write the measurements as CSV, gzipped if the name ends in .gz; return how many there are.

    A row for each point, a column for each name of its shape (empty where the point has no such name) and each field.
    """
    import pandas

    measurements = load_measurements(database, get_hardware(database, hardware_id))
    rows = [asdict(row) for row in measurements]
    table = pandas.DataFrame([row.pop("shape") | row for row in rows]).convert_dtypes()
    _write(Path(path), table.to_csv(index=False))
    return len(measurements)


def _write(path: Path, text: str) -> None:
    data = text.encode()
    replace_file(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


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
    content = read_json(path)
    with located(path):
        profile = parse(Profile, of_schema(content, SCHEMA))
        _check_limits("hardware", profile.hardware)
        first_at: dict[MeasurementKey, int] = {}
        for index, row in enumerate(profile.measurements):
            where = f"measurements[{index}]"
            _check_limits(where, row)
            _check_time(where, row)
            if first_at.setdefault(row.key, index) != index:
                allowed = f"must not repeat measurements[{first_at[row.key]}]"
                raise UserError(where, ", ".join(map(str, row.key)), allowed)
    return profile


def _check_time(where: str, row: Measurement) -> None:
    """Raise UserError for a time shorter than any device can reach."""
    if row.median_us < _LEAST_US:
        raise UserError(f"{where}.median_us", row.median_us, f"no operation ends within {_LEAST_US:g} us")
    if {"m", "n", "k"} <= row.shape.keys():
        rate = 2 * row.shape["m"] * row.shape["n"] * row.shape["k"] / (row.median_us * 1e-6)
        if rate > _MOST_FLOPS:
            allowed = f"a product of this shape would run at {rate:.1e} FLOP/s; no device reaches {_MOST_FLOPS:.0e}"
            raise UserError(f"{where}.median_us", row.median_us, allowed)


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


def _portable(row: Measurement) -> dict[str, Any]:
    values = asdict(row) | {"measured_at": row.measured_at.isoformat()}
    del values["source"]  # set to "import" on import
    return values

"""Export and import: nothing is lost, nothing older wins, nothing malformed enters."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from db.rows.archive import export_hardware, import_hardware
from db.rows.hardware import get_hardware, list_hardware, save_hardware
from db.rows.measurements import Source, load_measurements, save_measurements
from db.store.engine import Database, open_database
from tests.db.samples import make_hardware, make_measurement

ROWS = [make_measurement(8), make_measurement(64, variant="fused"), make_measurement(512, noisy=True)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A file with three rows, exported from another database."""
    path = tmp_path / "profile.json"
    with open_database(f"sqlite:///{tmp_path / 'cluster.db'}") as cluster:
        save_measurements(cluster, make_hardware(), ROWS)
        assert export_hardware(cluster, save_hardware(cluster, make_hardware()), path) == len(ROWS)
    return path


def test_a_profile_travels(archive: Path, database: Database) -> None:
    hardware_id, num_new, num_updated = import_hardware(database, archive)
    assert (num_new, num_updated) == (3, 0)
    assert get_hardware(database, hardware_id) == make_hardware()
    rows = load_measurements(database, make_hardware())
    assert {row.source for row in rows} == {Source.IMPORT}
    exported_again = archive.with_suffix(".again")
    export_hardware(database, hardware_id, exported_again)
    assert exported_again.read_bytes() == archive.read_bytes()


def test_importing_again_changes_nothing(archive: Path, database: Database) -> None:
    first = import_hardware(database, archive)
    before = load_measurements(database, make_hardware())
    assert import_hardware(database, archive) == (first.hardware_id, 0, 0)
    assert load_measurements(database, make_hardware()) == before


def test_the_newer_row_stays(archive: Path, database: Database) -> None:
    own = make_measurement(8, minutes=5, median_us=11.0)
    save_measurements(database, make_hardware(), [own, make_measurement(64, variant="fused", minutes=-5)])
    assert import_hardware(database, archive)[1:] == (1, 1)
    rows = {row.key: row for row in load_measurements(database, make_hardware())}
    assert rows[own.key] == own
    assert rows[ROWS[1].key].measured_at == ROWS[1].measured_at


def test_gzip_by_name(archive: Path, database: Database, tmp_path: Path) -> None:
    hardware_id = import_hardware(database, archive).hardware_id
    export_hardware(database, hardware_id, tmp_path / "p.json.gz")
    assert gzip.decompress((tmp_path / "p.json.gz").read_bytes()) == archive.read_bytes()
    with open_database("sqlite://") as in_memory:
        assert import_hardware(in_memory, tmp_path / "p.json.gz").num_new == 3


def test_a_line_a_measurement(archive: Path) -> None:
    lines = archive.read_text().splitlines()
    assert sum('"op": "matmul"' in line for line in lines) == len(ROWS)


def edit_row(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["measurements"][1].__setitem__(name, value)


def fast(median_us: float, **shape: int) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        row = content["measurements"][1]
        row |= {"min_us": median_us, "p10_us": median_us, "median_us": median_us}
        row["shape"] |= shape

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda content: content.update(schema="isochunk.profile/2"),
            "schema: isochunk.profile/2; isochunk.profile/1 is the version",
        ),
        (lambda content: content.pop("schema"), "schema: missing; isochunk.profile/1 is the version"),
        (lambda content: content.pop("hardware"), "hardware: missing"),
        (lambda content: content["hardware"].pop("device"), "hardware.device: missing"),
        (lambda content: content["hardware"].update(num_threads="two"), "hardware.num_threads: two; a whole number"),
        (lambda content: content.update(measurements={}), "measurements: {}; .*list"),
        (edit_row("median_us", "fast"), r"measurements\[1\].median_us: fast; a number"),
        (edit_row("median_us", 1e9), r"measurements\[1\].*min_us <= p10_us <= median_us"),
        (edit_row("shape", {"m": 1.5}), r"measurements\[1\].shape.m: 1.5; a whole number"),
        (edit_row("shape", {"m m": 1}), r"measurements\[1\].*shape name 'm m'"),
        (edit_row("measured_at", "2026-01-01T00:00:00"), r"measurements\[1\].*time zone"),
        (edit_row("num_samples", 0), r"measurements\[1\].*1 or more"),
        (edit_row("num_samples", 10**12), r"measurements\[1\].num_samples: 10+; must be from 1 to 2147483647"),
        (edit_row("shape", {"m": -1}), r"measurements\[1\].shape.m: -1; must be from 0"),
        (edit_row("shape", {"m": 10**13}), r"measurements\[1\].shape.m: 10+; must be from 0"),
        (edit_row("shape", {"M" * 9999: 1}), r"measurements\[1\]: shape name 'M+\.\.\.M+' must match"),
        (edit_row("op", "not a word"), r"measurements\[1\].op: not a word; must be a word"),
        (edit_row("op", "m" * 9999), r"measurements\[1\].op: m+\.\.\.m+; must be a word"),
        (edit_row("median_us", 10**400), r"whole numbers of at most 64 bits \(measurements\[1\].median_us\)"),
        (fast(0.001), r"measurements\[1\].median_us: 0.001; no operation ends within 0.01 us"),
        (fast(0.02, m=2**20), r"measurements\[1\].median_us: 0.02; .*would run at 1.4e\+19 FLOP/s"),
        (edit_row("measured_at", "0001-01-01T00:00:00+14:00"), r"measurements\[1\].measured_at: .*year from 1970"),
        (lambda content: content["hardware"].update(memory_bytes=10**30), r"at most 64 bits \(hardware.memory_bytes\)"),
        (lambda content: content["hardware"].update(memory_bytes=-1), "hardware.memory_bytes: -1; must be from 0"),
        (
            lambda content: content["hardware"].update(device="a\ud800"),
            r"lone surrogates .*\(hardware.device\)",
        ),
        (lambda content: content["hardware"].update(device="a\0b"), r"hardware.device: a\\x00b; must be printable"),
        (
            lambda content: content["measurements"].append(content["measurements"][0]),
            r"\[3\].*not repeat .*\[0\]",
        ),
    ],
)
def test_malformed_content_is_named_and_nothing_kept(
    archive: Path, database: Database, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads(archive.read_text())
    edit(content)
    archive.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        import_hardware(database, archive)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list_hardware(database) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"[]", "an object of schema isochunk.profile/1 is needed"),
        (b"[" * 100_000, "must be JSON"),
        (b"\xff\xfe\x00", "must be UTF-8 text"),
        (b"\x1f\x8bnot gzip", "must be a readable file"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-9], "must be a readable file"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with open_database("sqlite://") as database, pytest.raises(UserError, match=message) as caught:
        import_hardware(database, path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with open_database("sqlite://") as database:
        hardware_id = save_hardware(database, make_hardware())
        with pytest.raises(UserError, match="must be a readable file \\(No such file or directory\\)"):
            import_hardware(database, tmp_path / "missing.json")
        with pytest.raises(UserError, match="cannot be written \\(No such file or directory\\)"):
            export_hardware(database, hardware_id, tmp_path / "missing" / "p.json")
        (tmp_path / "folder").mkdir()
        with pytest.raises(UserError, match="cannot be written \\(Is a directory\\)"):
            export_hardware(database, hardware_id, tmp_path / "folder")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]  # no temporary file is left
        with pytest.raises(UserError, match="hardware: 9; must be one of"):
            export_hardware(database, 9, tmp_path / "p.json")

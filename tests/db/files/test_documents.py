"""The door for files: what it refuses, in which words, and that nothing large is read whole."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from db.files.documents import MAX_BYTES, MAX_LINES, located, of_schema, parse, read_json, read_json_lines, write_json
from db.files.json_text import MAX_DEPTH, MAX_KEYS, MAX_PARTS
from db.files.numbers import whole_number
from db.files.replacement import check_writable


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    number: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError("number", self.number, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    parts: tuple[Part, ...]
    sizes: Mapping[str, int] | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be JSON (Expecting value"),
        (b"{", "must be JSON (Expecting property name"),
        (b"\xef\xbb\xbf{}", "must be JSON (Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "must be UTF-8 text (byte 7 is not)"),
        ("{}".encode("utf-16"), "must be UTF-8 text (byte 0 is not)"),
        (b"[" * 100_000, f"must be JSON nested at most {MAX_DEPTH} deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, f"must be JSON nested at most {MAX_DEPTH} deep (a.a.a"),
        (b'{"a": [1, NaN]}', "must be JSON with finite numbers alone (a[1])"),
        (b'{"a": {"b": -Infinity}}', "must be JSON with finite numbers alone (a.b)"),
        (b'{"a": 1e999}', "must be JSON with finite numbers alone (a)"),
        (b'{"a": 18446744073709551616}', "must be JSON with whole numbers of at most 64 bits (a)"),
        (b"9" * 5000, "must be JSON (Exceeds the limit"),
        (b'{"a": ["\\ud800"]}', "must be JSON without lone surrogates in its texts (a[0])"),
        (b'{"\\ud800": 1}', "must be JSON without lone surrogates in its texts"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "must be JSON (the key 'c' stands twice in one object)"),
        (b"[" + b"{}," * MAX_PARTS + b"{}]", f"must be JSON of at most {MAX_PARTS} objects and lists"),
        (
            json.dumps({str(number): 0 for number in range(MAX_KEYS + 1)}).encode(),
            f"must be JSON (an object has {MAX_KEYS + 1} keys, at most {MAX_KEYS} are read)",
        ),
        (b" " * (MAX_BYTES + 1), "must be at most 32 MiB, unpacked"),
        (gzip.compress(b" " * (MAX_BYTES + 1), mtime=0), "must be at most 32 MiB, unpacked"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-9], "must be a readable file (Compressed file ended"),
        (b"\x1f\x8bnot gzip", "must be a readable file (Unknown compression method)"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_files_that_are_no_usable_json(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(path, field="--plan")
    assert str(caught.value).startswith("--plan: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["missing.json", "x" * 300, "a\0b", "."])
def test_paths_that_are_no_files(tmp_path: Path, name: str) -> None:
    for read in (read_json, lambda path: read_json_lines(path, Part)):
        with pytest.raises(UserError, match=r"must be a readable file \(") as caught:
            read(tmp_path / name)
        assert len(str(caught.value)) < 250


def test_gzip_is_read_like_plain(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(gzip.compress(b'{"a": 1}'))
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "content: []; an object is needed"),
        ({}, "parts: missing; a value is needed"),
        ({"parts": 5}, "parts: 5; a list is needed"),
        ({"parts": [{"number": 1}, {"number": "2"}]}, 'parts[1].number: "2"; a whole number is needed'),
        ({"parts": [{"number": True}]}, "parts[0].number: True; a whole number is needed"),
        ({"parts": [{"number": 1.0}]}, "parts[0].number: 1.0; a whole number is needed"),
        ({"parts": [{"number": 1, "seconds": "1"}]}, 'parts[0].seconds: "1"; a number is needed'),
        ({"parts": [{"number": -4}]}, "parts[0].number: -4; at least 0"),
        ({"parts": [], "sizes": {"a" * 5000: "x"}}, f"sizes.{'a' * 20}...{'a' * 17}: x; a whole number is needed"),
        ({"parts": [], "sizes": {"\x1b[2J": "x"}}, "sizes.\\x1b[2J: x; a whole number is needed"),
    ],
)
def test_content_of_another_type(content: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Whole, content)
    assert str(caught.value) == message


def test_fields_that_nobody_knows_are_ignored() -> None:
    assert parse(Whole, {"parts": [{"number": 1, "note": ""}], "more": 2}) == Whole(parts=(Part(number=1),))


def test_a_million_mistakes_are_one_line_and_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"^parts\[0\]: x; an object is needed$"):
        parse(Whole, {"parts": ["x"] * 1_000_000})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def test_schemas() -> None:
    assert of_schema({"schema": "a/1"}, "a/1") == {"schema": "a/1"}
    with pytest.raises(UserError, match="schema: a/2; a/1 is the version read here"):
        of_schema({"schema": "a/2"}, "a/1")
    with pytest.raises(UserError, match="schema: missing"):
        of_schema({}, "a/1")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    path.write_text('{"number": 1}\n\n  \r\n{"number": 2}')
    assert [(line.number, line.content.number) for line in read_json_lines(path, Part)] == [(1, 1), (4, 2)]
    path.write_text('{"number": 1}\n{"number": NaN}\n')
    with pytest.raises(UserError, match=r"parts.jsonl: line 2: must be JSON with finite numbers alone \(number\)"):
        read_json_lines(path, Part)
    path.write_text('{"number": 1}\n{"number": "1"}\n')
    with pytest.raises(UserError, match=r'parts.jsonl: line 2: number: "1"; a whole number is needed'):
        read_json_lines(path, Part)
    with pytest.raises(UserError, match="must be at most 0 MiB"):
        read_json_lines(path, Part, max_bytes=20)


def test_too_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    path.write_text('{"number":1}\n' * (MAX_LINES + 1))
    with pytest.raises(UserError, match=f"must have at most {MAX_LINES} lines"):
        read_json_lines(path, Part)


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="/dev/zero; must be at most 32 MiB"):
        read_json("/dev/zero")
    with pytest.raises(UserError, match="/dev/zero; must be at most 1 MiB"):
        read_json_lines("/dev/zero", Part, max_bytes=1 << 20)


def test_a_place_stands_before_the_field_and_long_paths_are_cut() -> None:
    with pytest.raises(UserError) as caught, located("/tmp/" + "p" * 5000):
        raise UserError("number", "v" * 5000, "at least 0")
    assert str(caught.value) == f"/tmp/{'p' * 35}...{'p' * 37}: number: {'v' * 40}...{'v' * 37}; at least 0"


def test_an_error_is_one_printable_line() -> None:
    error = UserError("a\x1b[2Jb\nc", "x\ny\u202e", "\x07 d")
    assert str(error) == "a\\x1b[2Jb\\nc: x\\ny\\u202e; \\x07 d"
    assert len(str(UserError("f" * 5000, 10**5000, "a" * 5000))) < 2500


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "cannot be written (File name too long)"),
        ("a\0b", "cannot be written (embedded null byte)"),
        (".", "must be a file, not a folder"),
        ("missing/a.json", "must be in a folder that exists"),
    ],
)
def test_places_where_nothing_can_be_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_writable("--output", tmp_path / name)
    assert str(caught.value).startswith("--output: ")
    assert message in str(caught.value)
    check_writable("--output", tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_and_keeps_the_old_file(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from db.files.documents import write_json; "
        "from db.files.replacement import check_writable; from db.errors import UserError\n"
        "path = Path(sys.argv[1]); write_json(path, [1]); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "for act in (lambda: check_writable('--output', path), lambda: write_json(path, list(range(10**5)))):\n"
        "    try: act(); print('written')\n"
        "    except UserError as error: print(error)\n"
    )
    path = tmp_path / "a.json"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        f"--output: {path}; cannot be written (no space left for its 64 KiB)",
        f"file: {path}; cannot be written (no space left for its 868 KiB)",
    ]
    assert read_json(path) == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "²", "-1", "1.5", "x", "0", "11", "9" * 5000, "\u0663", "1_0"])
def test_whole_numbers(text: str) -> None:
    assert whole_number("--n", " 007 ", most=10) == 7
    with pytest.raises(UserError, match=r"^--n: .*from 1 to 10") as caught:
        whole_number("--n", text, most=10)
    assert len(str(caught.value)) < 200

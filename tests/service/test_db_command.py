"""`isochunk db` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from click.testing import CliRunner

from db.errors import UserError
from db.rows.fits import save_fit
from db.rows.hardware import save_hardware
from db.rows.measurements import save_measurements
from db.rows.plans import save_plan_row
from db.rows.runs import RunOutcome, finish_run, start_run
from db.store.engine import open_database
from db.store.schema import HEAD
from service.cli.commands.db import command
from tests.db.samples import make_hardware, make_measurement

PLAN = {"model": {"name": "tiny"}, "precision": "float32", "parallel": {"tp_size": 1, "pp_size": 2}, "rounds": [[], []]}


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database with a row of everything."""
    url = f"sqlite:///{tmp_path / 'profile.db'}"
    with open_database(url) as database:
        save_measurements(database, make_hardware(), [make_measurement(8), make_measurement(64, minutes=1)])
        run_id = start_run(database, save_plan_row(database, PLAN), make_hardware(), study="s")
        finish_run(database, run_id, RunOutcome(makespan_s=1.25))
        save_fit(database, make_hardware(), "tiny", "float32", {}, {})
    return url


def run(*arguments: str | Path, fails: bool = False) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if fails:
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.mark.parametrize("name", ["path", "upgrade", "check", "list", "export", "import"])
def test_help(name: str) -> None:
    text = run(name, "--help")
    assert "--json" in text
    assert "--db URL" in text


def test_path(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = url.removeprefix("sqlite:///")
    assert run("path", "--db", url) == f"{file}\n"
    monkeypatch.setenv("ISOCHUNK_DB", url)
    assert run_json("path") == {"url": url, "path": file, "exists": True}
    assert run("path", "--db", "postgresql://me:secret@host/name") == "postgresql+psycopg://me:***@host/name\n"


def test_upgrade(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    assert run("upgrade", "--db", url) == f"{url}: revision {HEAD}, created\n"
    assert run_json("upgrade", "--db", url) == {"url": url, "found_revision": HEAD, "revision": HEAD}


def test_check(url: str) -> None:
    assert run("check", "--db", url) == f"{url}: whole\n"
    assert run_json("check", "--db", url) == {"url": url, "whole": True}


def test_list_tables(url: str) -> None:
    table = run("list", "--db", url)
    assert "Example CPU" in table and "2026-03-01 12:01:00" in table
    assert "k=256,m=64,n=512" in run("list", "measurements", "--db", url)
    plan = dict(line.split(maxsplit=1) for line in run("list", "plans", "--db", url).splitlines() if line[:2] == "  ")
    assert (plan["model"], plan["tp_size"], plan["sp_size"]) == ("tiny", "1", "-")
    assert "1.25" in run("list", "runs", "--db", url)
    assert all(len(line) <= 80 for line in table.splitlines())


def test_list_json(url: str) -> None:
    (hardware,) = run_json("list", "--db", url)
    assert (hardware["id"], hardware["device"], hardware["num_measurements"]) == (1, "Example CPU", 2)
    rows = run_json("list", "measurements", "--limit", "1", "--hardware", "1", "--db", url)
    assert [(row["shape"]["m"], row["measured_at"]) for row in rows] == [(64, "2026-03-01T12:01:00.123456+00:00")]
    assert run_json("list", "plans", "--db", url)[0]["plan"] == PLAN
    assert run_json("list", "runs", "--db", url)[0]["makespan_s"] == 1.25
    assert run_json("list", "fits", "--db", url)[0]["model_name"] == "tiny"
    assert run("list", "fits", "--hardware", "5", "--db", url, fails=True) == "hardware: 5; must be one of 1"


def test_empty_list(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    assert "nothing there yet" in run("list", "--db", url, fails=True)
    run("upgrade", "--db", url)
    assert run("list", "--db", url) == f"no hardware in {url}\n"
    assert run_json("list", "--db", url) == []
    assert "database is empty" in run("export", tmp_path / "p.json", "--db", url, fails=True)


def test_export_and_import(url: str, tmp_path: Path) -> None:
    file, laptop = tmp_path / "profile.json.gz", f"sqlite:///{tmp_path / 'laptop.db'}"
    assert run("export", file, "--db", url) == f"{file}: 2 measurements of hardware 1\n"
    assert run("import", file, "--db", laptop) == "hardware 1: 2 new measurements, 0 updated\n"
    assert run_json("import", file, "--db", laptop) == {"hardware_id": 1, "num_new": 0, "num_updated": 0}


def test_export_asks_which_of_several(url: str, tmp_path: Path) -> None:
    with open_database(url) as database:
        other = save_hardware(database, make_hardware(device="Example GPU", device_count=8))
    message = run("export", tmp_path / "p.json", "--db", url, fails=True)
    assert message == "--hardware: not given; must be one of 1 (Example CPU x2); 2 (Example GPU x8)"
    assert "0 measurements of hardware 2" in run("export", tmp_path / "p.json", "--hardware", str(other), "--db", url)


def test_measurements_as_a_table_for_a_notebook(url: str, tmp_path: Path) -> None:
    with open_database(url) as database:
        save_measurements(database, make_hardware(), [make_measurement(op="all_reduce", shape={"bytes": 1024})])
    for name in ("rows.csv", "rows.csv.gz"):
        assert run_json("export", tmp_path / name, "--db", url)["num_measurements"] == 3
        table = pandas.read_csv(tmp_path / name)
        products = table[table.op == "matmul"]
        assert products[["m", "n", "k", "median_us"]].to_numpy().tolist() == [
            [8, 512, 256, 10.125],
            [64, 512, 256, 10.125],
        ]
        assert table.bytes.dropna().tolist() == [1024]

"""`isochunk runs` on real runs of two cards, options from files, and completion."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from benchmarks.fuzz_files import PLAN
from db.store.engine import open_database
from service.cli.main import cli
from service.cli.output import show_table
from service.reasons.run_words import run_in_words
from service.use_cases.runs import run_details
from tests.structures import ROOT


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with 113 runs."""
    path = tmp_path_factory.mktemp("runs") / "h100x2.db"
    path.write_bytes(gzip.decompress((ROOT / "benchmarks/results/h100x2.db.gz").read_bytes()))
    open_database(f"sqlite:///{path}").close()
    return f"sqlite:///{path}"


def call(*words: object, fails: bool = False) -> Result:
    done = CliRunner().invoke(cli, list(map(str, words)), standalone_mode=False)
    assert (done.exception is not None) == fails, done.exception
    return done


def test_runs_are_listed_compared_and_explained(url: str) -> None:
    rows = json.loads(call("runs", "--limit", 5, "--db", url, "--json").stdout)
    assert [row["run"] for row in rows] == [113, 112, 111, 110, 109]
    for row in rows:
        assert row["work_s"] + row["waiting_s"] == pytest.approx(row["measured_s"])
        assert row["slower_pct"] == pytest.approx(100 * (row["measured_s"] / row["predicted_s"] - 1), abs=0.01)
    compared = json.loads(call("runs", "compare", 109, 113, "--db", url, "--json").stdout)
    assert [row["run"] for row in compared] == [109, 113]
    words = json.loads(call("runs", "explain", 24, "--db", url, "--json").stdout)["words"]
    assert "4.3% faster" in words["took"] and "stage 1 -4.4%" in words["work"]
    assert "1 s more of rounds" in call("runs", "explain", 113, "--db", url).stdout
    assert "nothing to explain" in call("runs", "explain", 7, "--db", url).stdout.replace("\n           ", " ")
    assert str(call("runs", "explain", 5000, "--db", url, fails=True).exception).startswith("run: 5000; must be")


def test_a_machine_that_was_faster_than_in_its_profile_is_said_to_be(url: str) -> None:
    with open_database(url) as database:
        details = run_details(database, 24)
    words = dict(run_in_words(replace(details, run=replace(details.run, slowdown=0.96)), "profile", "run"))
    assert words["machine"].startswith("The machine, by one product beside the run: 4.0% faster than in its profile")
    assert words["machine"].endswith("the prediction is off by +0.3%")
    assert words["so"].startswith("the machine itself was faster") and words["next"] == "profile"
    words = dict(run_in_words(replace(details, run=replace(details.run, slowdown=0.999)), "profile", "run"))
    assert "as fast as in its profile" in words["machine"] and "the machine itself" not in words["so"]


def test_runs_are_cleared_when_one_says_yes(url: str) -> None:
    assert call("runs", "clear", 1, 2, "--db", url).stdout == "2 runs would be removed: say --yes\n"
    assert call("runs", "clear", 1, 2, "--yes", "--db", url).stdout == "2 runs removed\n"
    assert "must be the id of a run" in str(call("runs", "clear", 1, "--db", url, fails=True).exception)
    assert len(json.loads(call("runs", "--limit", 200, "--db", url, "--json").stdout)) == 111


COST = {
    "schema": "isochunk.cost-model/1",
    "stages": [{"tokens": {"count": [0, 1024], "seconds": [0, 0.1]}, "attention": {"pair_s": 1e-9}}],
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tune]\nfly = 3", "--config: tune.fly: unknown; must be one of backend,"),
        ("[tune]\ncompare = 3", "--config: tune.compare: 3; must be true or false"),
        ("[tune]\npp-size = true", "--config: tune.pp-size: True; must be a value"),
        ("[tune]\npp-size = 'x'", "'x' is not a valid integer"),
        ("[profile]", "must have a table [tune] with the command's options"),
        ("tune = 3", "must have a table [tune] with the command's options"),
        ("[tune", "must be TOML (Expected ']'"),
        ("[tune]\npp-size = 2026-01-01", "must be TOML (Object of type date"),
        ("[tune]\nrate = inf", "must be JSON with finite numbers alone (tune.rate)"),
        ("a = " + "[" * 5000, "must be TOML nested at most 64 deep"),
        ("a = '\x00'", "must be TOML (Found invalid character"),
    ],
)
def test_files_of_options_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(text)
    error = call("tune", "--config", path, fails=True).exception
    assert message in str(error) or message in getattr(error, "message", "")


def test_options_come_from_a_file_and_stand_in_the_result(tmp_path: Path) -> None:
    path, cost = tmp_path / "options.toml", tmp_path / "cost.json"
    cost.write_text(json.dumps(COST))
    path.write_text(f'[tune]\ncost-model = "{cost}"\npp_size = 2\nprompt-lens = [3000, 200]\nwindow = 3\n')
    done = call("tune", "--config", path, "--window", 4, "--json")
    report = json.loads(done.stdout)
    assert report["options"] == {"cost_model": str(cost), "pp_size": 2, "prompt_lens": "3000,200", "window": "4"}
    assert report["plan"]["window"] == 4
    assert "Options from" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "_ISOCHUNK_COMPLETE" in call("completion", shell, "--print").stdout
    assert not any(tmp_path.iterdir())
    assert "it works in the next shell" in call("completion", shell).stdout
    (written,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "isochunk" in written.read_text()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "must be one of bash, zsh, fish" in str(call("completion", fails=True).exception)


def test_tables_leave_out_columns_that_a_page_has_no_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("plan", *(f"column {number}" for number in range(9)))
    show_table(names, [["TP1 SP2 ulysses PP2 x2 loop", *range(9)], ["TP1 PP1", *range(9)]], title="t" * 100)
    printed = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines() if "t" * 80 not in line)
    assert "TP1 SP2 ulysses PP2 x2 loop" in printed and "have also" in printed
    show_table(names, [["TP1 SP2 ulysses PP2 x2 loop", *range(9)]])
    assert capsys.readouterr().out.count("column") == 9


@pytest.mark.parametrize("what", [("24",), ("--hardware", "1"), ()])
def test_a_report_is_one_page_that_needs_nothing_beside_it(what: tuple[str, ...], url: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    call("report", *what, "-o", path, "--db", url)
    text = path.read_text()
    pictures = [f"<svg{part.split('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len(pictures) >= 3
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert "<script" not in text and "src=" not in text
    assert {part.split('"')[0] for part in text.split("http")[1:]} == {"://www.w3.org/2000/svg"}
    if what == ("24",):
        assert "4.3% faster" in text and "When rounds ran" in text
        assert "Where the seconds went" in text and "fill and drain" in text


def test_a_report_of_a_plan_escapes_what_files_say(tmp_path: Path) -> None:
    plan = PLAN | {"policy": "<script>alert(1)</script>"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    call("report", tmp_path / "plan.json", "-o", tmp_path / "plan.html")
    assert "<script" not in (tmp_path / "plan.html").read_text()
    refused = call("report", tmp_path / "plan.json", "-o", tmp_path / "none" / "x.html", fails=True).exception
    assert "must be in a folder that exists" in str(refused)

"""`isochunk quantize`: a checkpoint in, one in 8 bits out, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from db.errors import UserError
from db.rows.job_ends import VARIABLE, find_end
from db.store.engine import open_database
from profiler.model import load_model_shape
from service.cli.checkpoints.quantize import command
from service.cli.plot import command as plot
from service.use_cases.checkpoints.quantize import move_what_is_whole, partial_of
from tests.checkpoints import write_checkpoint, write_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "qwen3"))


@pytest.fixture
def invoke(model: Path, tmp_path: Path) -> Invoke:
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*arguments: str, output: str = "made") -> Any:
        paths = [str(tmp_path / word) if word == "text.txt" else word for word in arguments]
        return CliRunner().invoke(command, [str(model), "-o", str(tmp_path / output), *paths], catch_exceptions=False)

    return run


def test_a_report_for_people_and_one_for_programs(invoke: Invoke, tmp_path: Path) -> None:
    words = ("--precision", "w8a8-static", "--calibration", "text.txt", "--held-out", "text.txt", "--smooth", "0.5")
    done = invoke(*words)
    assert done.exit_code == 0
    assert "held-out tokens" in done.stdout
    assert f"written to {tmp_path / 'made'}" in done.stdout
    report = json.loads(invoke(*words, "--json", output="again").stdout)
    assert report["precision"] == "w8a8-static"
    assert report["calibration_tokens"] == len(TEXT)
    assert len(report["linears"]) == 4 * 5
    assert abs(report["perplexity_loss"]) < 0.05
    shape = load_model_shape(str(tmp_path / "made"))
    assert shape.quantization is not None
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "made", "again"}
    for one in report["linears"]:
        assert one["held_out"] == pytest.approx(one["seen"], rel=1e-5)  # the same text
        if one["linear"] in ("qkv", "gate_up"):
            assert one["input_end"] == one["smoothed"]["most"] != one["seen"]["most"]
        else:
            assert one["smoothed"] is None and one["input_end"] == one["seen"]["most"]
            assert one["seen"]["most"] >= one["seen"]["upper"] >= one["seen"]["median"] >= one["seen"]["lower"] > 0.0


def test_ranges_are_drawn_with_what_the_calibration_set_did_not_cover(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("dog " * 16)
    words = ("--precision", "w8a8-static", "--calibration", str(tmp_path / "short.txt"), "--held-out", "text.txt")
    (tmp_path / "report.json").write_text(printed := invoke(*words, "--json").stdout)
    further = [one["linear"] for one in json.loads(printed)["linears"] if one["held_out"]["most"] > one["seen"]["most"]]
    assert "down" in further
    output = tmp_path / "ranges.svg"
    arguments = [str(tmp_path / "report.json"), "-o", str(output)]
    assert CliRunner().invoke(plot, arguments, catch_exceptions=False).exit_code == 0
    drawn = " ".join("".join(each.itertext()) for each in ElementTree.fromstring(output.read_text()).iter())
    assert "in w8a8-static: ranges on 64 tokens" in drawn
    assert f"Input of down: {further.count('down')} of 5 layers reach further on the held-out text" in drawn
    (tmp_path / "report.json").write_text(invoke("--held-out", "text.txt", "--json", output="plain").stdout)
    with pytest.raises(UserError, match="tells no ranges: quantize with --calibration"):
        CliRunner().invoke(plot, arguments, standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "w8a8-static"), "--calibration: missing; static ranges need prompts"),
        (("--smooth", "0.5"), "--calibration: missing; --smooth need"),
        (("--smooth", "2"), "--smooth: 2.0; must be between 0 and 1"),
        (("--asymmetric",), "--asymmetric: w8a8; only w8a8-static"),
        (("--keep", "embed_tokens"), "--keep: embed_tokens; fits no linear"),
        (("--calibration", "/nowhere.txt"), "--calibration: /nowhere.txt; must be a readable file (No such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: tuple[str, ...], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        invoke(*words)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_job_ends_when_its_checkpoint_is_whole_and_before_it_is_in_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOCHUNK_DB", f"sqlite:///{tmp_path / 'rows.db'}")
    monkeypatch.setenv(VARIABLE, "a")
    made, partial = tmp_path / "made", partial_of(tmp_path / "made", "a")
    partial.mkdir()
    (partial / "left by a process that was killed").touch()
    invoked = CliRunner().invoke(command, [str(model), "-o", str(made), "--json"], catch_exceptions=False)
    with open_database() as database:
        end = find_end(database, "a")
    assert end is not None
    assert end.result == json.loads(invoked.stdout)
    whole = {path.name for path in made.iterdir()}
    made.rename(partial)  # as it stands when the process is killed between its end and the move
    move_what_is_whole(Path(end.result["folder"]), "a")
    move_what_is_whole(made, "a")
    assert {path.name for path in made.iterdir()} == whole
    with pytest.raises(UserError, match="job: a; has ended already"):
        CliRunner().invoke(command, [str(model), "-o", str(tmp_path / "twice")], catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"made"}

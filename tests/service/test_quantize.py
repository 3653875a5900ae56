"""`isochunk quantize`: a checkpoint in, one in 8 bits out, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from db.errors import UserError
from profiler.model import load_model_shape
from service.cli.checkpoints.quantize import command
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

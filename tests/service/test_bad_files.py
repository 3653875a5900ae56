"""Files and numbers that once ended in a traceback, in gigabytes or in minutes: one line each and exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz_files import CONFIG, COST_MODEL, PLAN
from service.cli.main import main
from tests.checkpoints import write_checkpoint
from tests.tuner.atom import atom

ONE_STAGE = COST_MODEL | {"stages": COST_MODEL["stages"][:1]}
LONG = {
    "model": CONFIG | {"max_position_embeddings": 2**29},
    "requests": [{"id": "a", "prompt_tokens": 300_000_000}],
    "rounds": [[{"request": 0, "start": 0, "tokens": 300_000_000}]],
    "predicted": {"makespan_s": 1.0},
}
MANY = {
    "requests": [{"id": "a", "prompt_tokens": 300_000}],
    "rounds": [[{"request": 0, "start": index, "tokens": 1}] for index in range(300_000)],
    "predicted": {"makespan_s": 1.0},
}
Isochunk = Callable[..., str]


@pytest.fixture
def isochunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Isochunk:
    """Runs a command that is refused; returns its one line."""

    def run(*arguments: object) -> str:
        monkeypatch.setenv("ISOCHUNK_DB", f"sqlite:///{tmp_path / 'rows.db'}")
        monkeypatch.setattr(sys, "argv", ["isochunk", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert (caught.value.code, printed.out) == (2, "")
        (line,) = printed.err.splitlines()
        assert line.isprintable()
        assert len(line) < 1000
        return line

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": CONFIG | {"rope_theta": float("inf")}}, "must be JSON with finite numbers alone (model.rope_theta)"),
        ({"model": CONFIG | {"more": [float("nan")]}}, "must be JSON with finite numbers alone (model.more[0])"),
        ({"model": CONFIG | {"head_dim": 15}}, "head_dim: 15; must be even"),
        (
            {"requests": [{"id": "\ud800", "prompt_tokens": 5}]},
            "must be JSON without lone surrogates in its texts (requests[0].id)",
        ),
        (MANY, "rounds: 300000 entries; at most 100000"),
        (LONG, "prompt_tokens of all requests: 300000000; at most 16777216 in a plan that is run"),
        ({"window": 10**18}, "window: 1000000000000000000; at least 1 round, at most 1000000"),
        ({"threads_per_rank": 10**9}, "threads_per_rank: 1000000000; at least 1, at most 4096"),
        ({"precision": "\x1b[2J"}, "precision: \\x1b[2J; supported are"),
        ({"precision": "p" * 5000}, f"precision: {'p' * 40}...{'p' * 37}; supported are"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_plans(change: dict[str, Any], message: str, isochunk: Isochunk, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN | change))
    assert message in isochunk("run-plan", path, "--random-weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pp-size", 10**9, "--prompt-lens", 1000), "pp_size: 1000000000; at least 1, at most 1024"),
        (("--pp-size", 10**6, "--prompt-lens", 1000), "pp_size: 1000000; at least 1, at most 1024"),
        (("--pp-size", 4, "--prompt-lens", 2**40), "prompt_tokens of all requests: 1099511627776; at most 67108864"),
    ],
)
def test_sizes_of_a_plan(arguments: tuple[object, ...], message: str, isochunk: Isochunk, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(ONE_STAGE))
    assert message in isochunk("tune", "--cost-model", path, *arguments)


def test_a_world_that_nobody_has(isochunk: Isochunk) -> None:
    line = isochunk("tune", "llama-3-8b", "--world-size", 999_999_999_999, "--prompt-lens", 1000)
    assert "world_size: 999999999999; must be 1 or more, at most 100000" in line


@pytest.mark.parametrize("text", ["²", "9" * 5000, "1,,2", "0", "-1"])
def test_tensor_parallel_sizes_that_are_no_numbers(text: str, isochunk: Isochunk) -> None:
    assert "--tp-sizes: " in isochunk("profile", "llama-3-8b", "--world-size", 2, "--tp-sizes", text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("tune", "{long}", "--prompt-lens", "5"),
        ("profile", "{long}", "--world-size", "1"),
        ("run-plan", "{long}", "--random-weights"),
        ("export", "{long}", "--engine", "vllm"),
        ("quantize", "{long}", "-o", "out"),
        ("tune", "--cost-model", "{long}", "--pp-size", "2", "--prompt-lens", "5"),
    ],
)
def test_names_that_no_file_can_have(arguments: tuple[str, ...], isochunk: Isochunk) -> None:
    assert "File name too long" in isochunk(*(word.format(long="x" * 5000) for word in arguments))


@pytest.mark.parametrize(("reader", "end"), [("> /dev/full", (2, "Error: output: No space left on device\n")),
                                             ("| true", (0, ""))])  # fmt: skip
def test_an_output_that_cannot_be_written(reader: str, end: tuple[int, str]) -> None:
    command = f"{sys.executable} -m service --help {reader}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == end


@pytest.mark.parametrize("words", ["", "--compare", "--json"])
def test_a_reader_that_has_gone_away(words: str, tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(atom(1).to_json()))
    call = f"{sys.executable} -m service tune --cost-model {tmp_path}/cost.json --pp-size 2 --prompt-lens 9000 {words}"
    done = subprocess.run(f"bash -c '{call} | true; exit $PIPESTATUS'", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_shows_that_a_plan_is_made(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(atom(1).to_json()))
    options = ("--cost-model", tmp_path / "cost.json", "--pp-size", "2", "--prompt-lens", "9000", "-o", tmp_path / "p")
    command = [sys.executable, "-m", "service", "tune", *map(str, options)]
    ours, its = os.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=its, text=True, env=os.environ | {"TERM": "xterm"})
    os.close(its)
    assert b"Planning" in os.read(ours, 10_000) and done.returncode == 0
    os.close(ours)
    assert done.stdout.startswith("Recommended")
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_a_text_without_end(isochunk: Isochunk, weights: Path, tmp_path: Path) -> None:
    options = ("--precision", "w8a8-static", "--calibration", "/dev/zero", "-o", tmp_path / "out")
    assert "--calibration: /dev/zero; must be at most 64 MiB" in isochunk("quantize", weights, *options)
    assert not (tmp_path / "out").exists()


def test_archives_without_end(isochunk: Isochunk, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.json.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(4 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in (bomb, "/dev/zero"):
        assert "must be at most 32 MiB, unpacked" in isochunk("db", "import", path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"5", "generation_config.json: content: 5; an object is needed"),
        ("generation_config.json", b"[]", "generation_config.json: content: []; an object is needed"),
        ("generation_config.json", b"{", "must be JSON (Expecting property name"),
        ("generation_config.json", b"\xef\xbb\xbf{}", "must be JSON (Unexpected UTF-8 BOM"),
        ("generation_config.json", b'{"a": "\xff"}', "must be UTF-8 text (byte 7 is not)"),
        ("generation_config.json", b"[" * 100_000, "must be JSON nested at most 64 deep"),
        ("generation_config.json", b'{"eos_token_id": [{}]}', "eos_token_id[0]: {}; a whole number is needed"),
        ("generation_config.json", b'{"eos_token_id": "end"}', "eos_token_id[0]: end; a whole number is needed"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}', "weight_map.a: 5; a string is needed"),
        ("model.safetensors.index.json", b'{"weight_map": ' + b"[" * 100_000, "must be JSON nested at most 64 deep"),
        ("model.safetensors.index.json", b"{}", "weight_map: missing; a value is needed"),
        *(
            (
                "model.safetensors.index.json",
                json.dumps({"weight_map": {"a": file}}).encode(),
                "must be the name of a file in the folder",
            )
            for file in ("../other/model.safetensors", "/etc/passwd", "a/b", "..", "", "a\0b")
        ),
        ("config.json", b"\xef\xbb\xbf{}", "must be JSON (Unexpected UTF-8 BOM"),
        ("config.json", b'{"a": 1, "a": 2}', "must be JSON (the key 'a' stands twice in one object)"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_checkpoints(
    name: str, content: bytes, message: str, weights: Path, isochunk: Isochunk, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    plan = {
        "schema": "isochunk.plan/1",
        "model": {},
        "precision": "float32",
        "parallel": {"tp_size": 1, "pp_size": 1, "layer_partition": [5]},
        "requests": [{"prompt_tokens": 5}],
        "rounds": [[{"request": 0, "start": 0, "tokens": 5}]],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert message in isochunk("run-plan", tmp_path / "plan.json", "--weights", folder)

"""`isochunk profile` on a tiny model: real ranks over gloo, a real database, interrupts and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from db.errors import UserError
from db.rows.hardware import list_hardware
from db.rows.measurements import Measurement, MeasurementKey, load_measurements
from db.store.engine import open_database
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.model.precision import SUPPORTED
from profiler.points.point import COLLECTIVES, Op
from service.cli.commands.profile import command as profile_command
from service.cli.main import main

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
TIMEOUT_S = 280
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)  # on a busy machine a profile takes as long as its budget lets it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def command(model: Path, database: Path, *options: str) -> list[str]:
    sizes = ("--context-length", "16", "--device", "cpu", "--threads-per-rank", "1")
    return [sys.executable, "-m", "service", "profile", str(model), *sizes, "--db", f"sqlite:///{database}", *options]


def profile(model: Path, database: Path, *options: str) -> Any:
    done = subprocess.run(
        command(model, database, "--json", *options), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(database: Path) -> list[Measurement]:
    with open_database(f"sqlite:///{database}", read_only=True) as opened:
        return [row for kept in list_hardware(opened) for row in load_measurements(opened, kept.hardware)]


def dates(database: Path) -> dict[MeasurementKey, datetime]:
    return {row.key: row.measured_at for row in rows(database)}


@contextmanager
def started(model: Path, database: Path) -> Iterator[subprocess.Popen[str]]:
    """A profile of one rank that has rows already and more to measure, in a process group of its own."""
    arguments = command(model, database, "--world-size", "1")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (database.exists() and _num_rows(database) > 5):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def _num_rows(database: Path) -> int:
    try:
        return len(rows(database))
    except UserError:  # the tables are being made
        return 0


def wait_for_ranks(group: int) -> None:
    """Wait until no process of the group is left, so that nothing writes any more."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("ranks outlived their launcher")


def test_every_row_of_a_profile_is_there_and_sane_and_the_next_measures_nothing(model: Path, tmp_path: Path) -> None:
    database = tmp_path / "profile.db"
    summary = profile(model, database, "--world-size", "2", "--context-length", "32")
    assert summary["num_missing"] == 0 and not summary["interrupted"]
    assert summary["tp_sizes"] == [1, 2] and summary["dtype"] == "float32"
    found = rows(database)
    assert summary["num_new"] == len(found)
    assert {row.op for row in found} == {op.value for op in Op if op is not Op.EXPERTS}
    for row in found:
        assert 0 < row.min_us <= row.p10_us <= row.median_us <= row.p90_us and row.num_samples >= 1
        assert row.noisy or (row.p90_us - row.p10_us) / row.median_us <= 0.2
        assert row.busy_ranks in (1, 2) and row.group_size == (2 if row.op in COLLECTIVES else 1)
        assert row.code_version and row.measured_at.tzinfo is not None
    # On a busy machine a call may seem so dear that a point takes fewer.
    assert sum(row.num_samples >= 3 for row in found) > 0.5 * len(found)
    # hidden 32, FFN 64, 4 heads and 2 KV heads of 8: q|k|v, o, gate|up, down of one rank and of two
    products = {(row.shape["n"], row.shape["k"]) for row in found if row.op == Op.MATMUL}
    assert products == {(64, 32), (32, 32), (128, 32), (32, 64), (32, 16)}
    assert max(row.shape["chunk"] + row.shape["context"] for row in found if row.op == Op.ATTENTION) == 32
    assert {row.variant for row in found if row.op in (Op.ELEMENTWISE, Op.LAYER)} == {"qk-norm"}
    assert sorted(row.shape["chunks"] for row in found if row.op == Op.ROUND_OVERHEAD) == [1, 2, 4, 8]
    again = profile(model, database, "--world-size", "2", "--context-length", "32")
    assert again["num_new"] == 0 and [op["num_points"] for op in again["ops"]] == [
        op["num_points"] for op in summary["ops"]
    ]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_profile_goes_on_where_it_was(model: Path, tmp_path: Path, stop: signal.Signals) -> None:
    database = tmp_path / "profile.db"
    with started(model, database) as process:
        if stop is signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does
        else:
            process.send_signal(stop)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == (130 if stop is signal.SIGINT else -stop)
        assert "Traceback" not in errors
        wait_for_ranks(process.pid)
    before = dates(database)
    summary = profile(model, database, "--world-size", "1")
    after = dates(database)
    assert summary["num_missing"] == 0 and summary["num_new"] == len(after) - len(before) > 0
    assert {key: after[key] for key in before} == before


def test_two_profiles_at_once_on_one_database_both_finish(model: Path, tmp_path: Path) -> None:
    database = tmp_path / "profile.db"
    arguments = command(model, database, "--world-size", "1", "--json")
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
        # Which attention kernel is worth following may look different with the other's rows.
        missing = {op["op"]: op["num_missing"] for op in json.loads(output)["ops"]}
        assert missing.pop(Op.ATTENTION) <= 6 and not any(missing.values())
    assert len({row.key for row in rows(database)}) == len(rows(database)) > 0


def test_a_budget_too_small_for_one_point_says_what_is_needed(model: Path, tmp_path: Path) -> None:
    options = ProfileOptions(
        model=str(model), world_size=1, context_length=16, device_type="cpu", threads_per_rank=1, budget_s=0.001,
        db_url=f"sqlite:///{tmp_path / 'profile.db'}",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^--budget-s: 0\.001; at least \d+ for one point"):
        profile_model(options)


def test_out_of_budget_it_says_what_is_missing(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(model, tmp_path / "profile.db", "--world-size", "1", "--budget-s", "0"),
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Nothing new was measured: within 0 s no point could be begun" in done.stdout
    assert "points are missing; the same command goes on with them" in done.stdout


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"model": "no-such-folder"}, "MODEL", "must be a folder with a config.json, an id"),
        ({"tp_sizes": "3", "world_size": 3}, "tp_size", "must divide num_attention_heads = 4"),
        ({"tp_sizes": "2", "world_size": 3}, "tp_size", "must divide world_size = 3"),
        ({"tp_sizes": "1,x"}, "--tp-sizes", "must be a whole number from 1 to"),
        ({"tp_sizes": "0"}, "--tp-sizes", "must be from 1 to"),
        ({"sp_sizes": "3", "world_size": 2}, "sp_size", "must be 2 or more and divide world_size = 2"),
        ({"sp_sizes": "1"}, "sp_size", "must be 2 or more"),
        ({"dtype": "int3"}, "dtype", "supported are float32, bfloat16, float16"),
        ({"device_type": "tpu"}, "device", "must be cpu or cuda"),
        ({"context_length": 65}, "context_length", "at most 64: tiny0 has 64 positions"),
        ({"context_length": 0}, "context_length", "must be at least 1"),
    ],
)
def test_bad_options_are_named(model: Path, tmp_path: Path, options: dict[str, Any], field: str, allowed: str) -> None:
    database = tmp_path / "profile.db"
    asked: dict[str, Any] = {
        "model": str(model),
        "device_type": "cpu",
        "db_url": f"sqlite:///{database}",
        "budget_s": 0.0,
    }
    with pytest.raises(UserError) as raised:
        profile_model(ProfileOptions(**(asked | options)))
    assert raised.value.field == field and allowed in raised.value.allowed
    assert not database.exists()


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_a_budget_is_finite(seconds: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'profile.db'}"
    refused = CliRunner().invoke(profile_command, ["llama-3-8b", "--budget-s", seconds, "--db", url])
    assert isinstance(refused.exception, UserError)
    assert str(refused.exception) == f"--budget-s: {seconds}; must be a finite number of seconds, 0 or more"


def test_an_error_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["isochunk", *command(model, tmp_path / "profile.db", "--dtype", "int3")[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err == f"Error: dtype: int3; supported are {SUPPORTED}\n"

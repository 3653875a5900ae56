"""`isochunk run-plan` as a user calls it: hand-written plans, prompts as text, output, trace, rows, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from db.rows.runs import RunStatus, list_runs, load_round_times
from db.store.engine import open_database
from service.cli.main import main
from tests.checkpoints import write_checkpoint, write_tokenizer

BIN = Path(sys.executable).parent
COST_MODEL = {
    "schema": "isochunk.cost-model/1",
    "stages": [{"tokens": {"count": [0, 100], "seconds": [0.0, 0.01]}, "attention": {}}],
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_checkpoint(folder, "qwen3")
    return write_tokenizer(folder)


def _plan(weights: Path) -> dict[str, Any]:
    """A plan as one writes it by hand, with only the fields that it needs."""
    return {
        "schema": "isochunk.plan/1",
        "model": json.loads((weights / "config.json").read_text()),
        "precision": "float32",
        "parallel": {"tp_size": 1, "pp_size": 2, "layer_partition": [3, 2]},
        "requests": [{"id": "a", "prompt_tokens": 11}, {"id": "b", "prompt_tokens": 5}],
        "rounds": [
            [{"request": 0, "start": 0, "tokens": 7}],
            [{"request": 1, "start": 0, "tokens": 5}, {"request": 0, "start": 7, "tokens": 4}],
        ],
        "comment": "fields that nobody knows are ignored",
    }


def _run(tmp_path: Path, plan: object, *options: str | Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    return _isochunk(tmp_path, "run-plan", path, *options)


def _isochunk(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ISOCHUNK_DB": f"sqlite:///{tmp_path / 'runs.db'}", "OMP_NUM_THREADS": "1"}
    command = [BIN / "isochunk", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.timeout(300)
def test_a_hand_written_plan_runs_and_equals_transformers(weights: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "b", "text": "hello"}\n{"id": "a", "text": "hello world"}\n')
    output, trace = tmp_path / "out.json", tmp_path / "trace.json"
    done = _run(
        tmp_path, _plan(weights) | {"cost_model": COST_MODEL, "predicted": {"makespan_s": 0.5}}, "--weights", weights,
        "--prompts", prompts, "--max-new-tokens", "4", "--check", "--output", output, "--trace", trace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "measured s" in done.stdout
    written = json.loads(output.read_text())
    assert [request["id"] for request in written["requests"]] == ["a", "b"]
    for request in written["requests"]:
        assert request["tokens_equal"] is True
        assert len(request["token_ids"]) == 4
        assert isinstance(request["text"], str)
        assert 0 < request["ttft_s"] <= written["makespan_s"]
    assert len(written["rounds"]) == 4
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == {1, 2}
    with open_database(f"sqlite:///{tmp_path / 'runs.db'}") as database:
        (run,) = list_runs(database)
        rounds = load_round_times(database, run.id)
    assert (run.status, run.makespan_s, run.predicted_makespan_s) == (RunStatus.DONE, written["makespan_s"], 0.5)
    assert [(time.round, time.stage) for time in rounds] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.timeout(300)
def test_a_plan_of_several_groups_a_stage_and_a_card_runs_and_has_a_row_a_group(weights: Path, tmp_path: Path) -> None:
    passes = {"virtual_stages": 2, "stage_order": "v"}
    plan = _plan(weights) | {
        "schema": "isochunk.plan/3",
        "parallel": {"tp_size": 1, "pp_size": 2, "layer_partition": [1, 2, 1, 1]} | passes,
        "attention_kernels": {"usual": "flash3", "others": {"cpu-flash": [[5, 0]]}},
        "cost_model": COST_MODEL | {"schema": "isochunk.cost-model/2"} | passes,
    }
    trace = tmp_path / "trace.json"
    done = _run(tmp_path, plan, "--weights", weights, "--max-new-tokens", "3", "--check", "--trace", trace)
    assert done.returncode == 0, done.stderr
    with open_database(f"sqlite:///{tmp_path / 'runs.db'}") as database:
        (run,) = list_runs(database)
        rounds = load_round_times(database, run.id)
    assert [(time.round, time.stage) for time in rounds] == [(i, group) for i in range(2) for group in range(4)]
    assert "attention_kernels: flash3: not available here (cpu, float32); cpu-folded runs instead" in done.stderr
    assert run.details["missing_kernels"] == ["flash3"]
    assert all(time.predicted_s for time in rounds)
    assert all(before.finish_s <= after.start_s for before, after in pairwise(rounds[:4]))
    names = [event["args"]["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "M"]
    assert "group 2 on stage 1 (1 layers)" in names


@pytest.mark.timeout(300)
def test_torchrun_starts_the_ranks_just_as_well(weights: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "plan.json", tmp_path / "out.json"
    path.write_text(json.dumps(_plan(weights)))
    environment = os.environ | {"ISOCHUNK_DB": f"sqlite:///{tmp_path / 'runs.db'}", "OMP_NUM_THREADS": "1"}
    command = [
        BIN / "torchrun", "--nproc-per-node", "2", "--nnodes", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
        "--no-python", BIN / "isochunk", "run-plan", path, "--random-weights", "--output", output, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    # One of the ranks speaks.
    assert json.loads(done.stdout) == json.loads(output.read_text())
    with open_database(f"sqlite:///{tmp_path / 'runs.db'}") as database:
        assert [run.status for run in list_runs(database)] == [RunStatus.DONE]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ("not json", (), ("must be JSON",)),
        ({"schema": "isochunk.plan/4"}, (), ("schema: isochunk.plan/4", "isochunk.plan/3")),
        ({"rounds": [[{"request": 0, "start": 1, "tokens": 10}]]}, (), ("rounds[0][0].start: 1",)),
        ({"rounds": [[{"request": 0, "start": 0, "tokens": 12}]]}, (), ("rounds[0][0].tokens: 12", "1 to 11")),
        ({"rounds": [[{"request": 0, "start": 0, "tokens": 11}]]}, (), ("requests[1].prompt_tokens",)),
        ({"precision": "w4a4"}, (), ("precision: w4a4",)),
        ({"parallel": {"tp_size": 1, "pp_size": 2, "layer_partition": [3, 3]}}, (), ("layer_partition: [3, 3]",)),
        ({"parallel": {"tp_size": 8, "pp_size": 1, "layer_partition": [5]}}, (), ("tp_size: 8",)),
        ({}, ("--check",), ("--check",)),
        ({}, ("--output", "nowhere/out.json"), ("--output: nowhere/out.json",)),
        ({}, ("--max-new-tokens", "0"), ("--max-new-tokens: 0",)),
        ({}, ("--prompts", "nowhere.jsonl"), ("--prompts: nowhere.jsonl",)),
        ({}, ("--max-new-tokens", "9" * 20), ("--max-new-tokens: 99999999999999999999; at most",)),
        ({}, ("--threads-per-rank", "0"), ("--threads-per-rank: 0",)),
        ({}, ("--threads-per-rank", "-1"), ("--threads-per-rank: -1",)),
        ({}, ("--output", "/"), ("--output: /; must be a file, not a folder",)),
        ({}, ("--output", "x" * 300), ("--output: xxx", "File name too long")),
        ({}, ("--trace", "x" * 300), ("--trace: xxx", "File name too long")),
        ({}, ("--trace", "/"), ("--trace: /; must be a file, not a folder",)),
        (
            {
                "requests": [{"prompt_tokens": 10**12}],
                "rounds": [[{"request": 0, "start": 0, "tokens": 10**12}]],
            },
            (),
            ("requests[0].prompt_tokens: 1000000000000; at most 512",),
        ),
        ("[" * 100_000, (), ("must be JSON nested at most 64 deep",)),
        ({"predicted": {"makespan_s": 1.0, "ttft_s": [1.0]}}, (), ("predicted.ttft_s: 1 values",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    change: Any,
    options: tuple[str, ...],
    words: tuple[str, ...],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(change if isinstance(change, str) else json.dumps(_plan(weights) | change))
    database = f"sqlite:///{tmp_path / 'runs.db'}"
    arguments = ["isochunk", "run-plan", str(path), "--random-weights", "--db", database, *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    printed = capsys.readouterr()
    assert (caught.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert all(word in line for word in words), line


def test_without_weights_it_says_what_to_give(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(_plan(weights)))
    monkeypatch.setattr(
        sys, "argv", ["isochunk", "run-plan", str(tmp_path / "plan.json"), "--db", f"sqlite:///{tmp_path}/runs.db"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err == "Error: --weights: give either a folder of weights or --random-weights\n"

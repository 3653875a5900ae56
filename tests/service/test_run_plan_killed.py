"""A rank killed from outside in mid-run ends the run on all ranks within 30 s, and the run's row says failed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from db.rows.runs import RunStatus, StoredRun, list_runs
from db.store.engine import open_database
from profiler.comm.ranks.mark import Progress
from tests.checkpoints import write_checkpoint

BIN = Path(sys.executable).parent
TORCHRUN = (
    "torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    "--local-addr", "127.0.0.1", "--no-python",
)  # fmt: skip
ENDS_WITHIN_S = 30


def _wait_for(find: Callable[[], int | None], timeout_s: float = 60) -> int:
    end = time.monotonic() + timeout_s
    while (found := find()) is None:
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def _plan(folder: Path) -> Path:
    """Two requests of which the second arrives long after the first has run: a run that is surely under way."""
    write_checkpoint(folder, "qwen2", num_hidden_layers=2)
    plan = {
        "schema": "isochunk.plan/1",
        "model": json.loads((folder / "config.json").read_text()),
        "precision": "float32",
        "parallel": {"tp_size": 1, "pp_size": 2, "layer_partition": [1, 1]},
        "requests": [{"id": "a", "prompt_tokens": 4}, {"id": "b", "prompt_tokens": 4, "arrival_s": 300.0}],
        "rounds": [[{"request": i, "start": 0, "tokens": 4}] for i in (0, 1)],
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def _kill_rank_one_in_round_one(folder: Path, *launcher: str) -> tuple[subprocess.CompletedProcess[str], StoredRun]:
    environment = os.environ | {
        "ISOCHUNK_DB": f"sqlite:///{folder / 'runs.db'}", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
    }  # fmt: skip
    command = [*(BIN / name if name == "torchrun" else name for name in launcher), BIN / "isochunk", "run-plan",
               _plan(folder), "--weights", folder]  # fmt: skip

    def rank_one() -> int | None:
        marks = (Progress.read_file(path) for path in folder.glob("isochunk-*/progress-1"))
        return next((mark.pid for mark in marks if mark and (mark.stage, mark.round_index) == (1, 1)), None)

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        os.kill(_wait_for(rank_one), signal.SIGKILL)
        out, err = run.communicate(timeout=ENDS_WITHIN_S)
    with open_database(f"sqlite:///{folder / 'runs.db'}") as database:
        (row,) = list_runs(database)
    return subprocess.CompletedProcess(command, run.returncode, out, err), row


@pytest.mark.timeout(120)
def test_the_launcher_names_the_rank_its_stage_and_its_round(tmp_path: Path) -> None:
    done, row = _kill_rank_one_in_round_one(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Error: rank 1, stage 1, round 1: killed by SIGKILL\n"
    assert (row.status, row.failed_rank, row.failed_stage, row.failed_round) == (RunStatus.FAILED, 1, 1, 1)


@pytest.mark.timeout(120)
def test_under_torchrun_the_row_says_failed_too(tmp_path: Path) -> None:
    done, row = _kill_rank_one_in_round_one(tmp_path, *TORCHRUN)
    assert done.returncode == 1
    assert row.status is RunStatus.FAILED
    assert "another rank" in (row.error or "")


@pytest.mark.timeout(180)
def test_two_agents_of_torchrun_run_a_plan_as_two_nodes_do(tmp_path: Path) -> None:
    """As on two hosts: each agent starts a stage of two ranks, and meets the other over the loopback network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_checkpoint(tmp_path / "model", "qwen2", num_hidden_layers=2)
    plan = {
        "schema": "isochunk.plan/1",
        "model": json.loads((tmp_path / "model" / "config.json").read_text()),
        "precision": "float32",
        "parallel": {"tp_size": 2, "pp_size": 2, "layer_partition": [1, 1]},
        "requests": [{"id": "a", "prompt_tokens": 40}],
        "rounds": [[{"request": 0, "start": start, "tokens": 10}] for start in (0, 10, 20, 30)],
        "window": 2,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    environment = os.environ | {
        "ISOCHUNK_DB": f"sqlite:///{tmp_path / 'runs.db'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    agents = [
        subprocess.Popen(
            [BIN / "torchrun", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2", "--rdzv-backend",
             "static", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--no-python",
             BIN / "isochunk", "run-plan", tmp_path / "plan.json", "--weights", tmp_path / "model",
             "--max-new-tokens", "3", "--check", "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=150) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    result = json.loads(outputs[0][0])
    assert outputs[1][0] == "" and [request["tokens_equal"] for request in result["requests"]] == [True]
    with open_database(f"sqlite:///{tmp_path / 'runs.db'}", read_only=True) as database:
        assert [row.status for row in list_runs(database)] == [RunStatus.DONE]

"""A rank killed from outside in mid-run ends the run on all ranks within 30 s, and the run's row says failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from db.engine import open_database
from db.runs import RunStatus, StoredRun, list_runs
from profiler.comm.mark import Progress
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
        for path in folder.glob("isochunk-*/progress-1"):
            if Progress.read(path) == (1, 1):
                mapped = [maps.parent.name for maps in Path("/proc").glob("[0-9]*/maps") if _reads(maps, str(path))]
                return int(mapped[0]) if mapped else None
        return None

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        os.kill(_wait_for(rank_one), signal.SIGKILL)
        out, err = run.communicate(timeout=ENDS_WITHIN_S)
    with open_database(f"sqlite:///{folder / 'runs.db'}") as database:
        (row,) = list_runs(database)
    return subprocess.CompletedProcess(command, run.returncode, out, err), row


def _reads(maps: Path, text: str) -> bool:
    try:
        return text in maps.read_text()
    except OSError:
        return False


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

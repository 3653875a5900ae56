"""`isochunk train` on the command line: a checkpoint that Transformers reads, and a curve that kills do not change."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.train.saving import latest, read_notes
from tests.runtime.cases import make_plan, prompts

STEPS, KILLS = 12, 2


@pytest.fixture
def command(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], list[str]]:
    weights = checkpoint("llama-bias-one-kv-head")
    plan, data = tmp_path / "plan.json", tmp_path / "data.jsonl"
    plan.write_text(json.dumps(make_plan(weights).to_json()))
    lines = [{"id": str(index), "token_ids": ids} for index, ids in enumerate(prompts(1500, 700))]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def words(output: str) -> list[str]:
        return [
            sys.executable, "-m", "service", "train", str(plan), "--weights", str(weights), "--data", str(data),
            "-o", str(tmp_path / output), "--steps", str(STEPS), "--learning-rate", "1e-3", "--save-every", "2",
            "--device", "cpu", "--db", f"sqlite:///{tmp_path / 'isochunk.db'}", "--json",
        ]  # fmt: skip

    return words


def records(state: Path) -> list[tuple[float, float]]:
    folder = latest(state)
    assert folder is not None
    return [(record["loss"], record["norm"]) for record in read_notes(folder)["records"]]


def test_kills_do_not_change_the_curve(command: Callable[[str], list[str]], tmp_path: Path) -> None:
    done = subprocess.run(command("whole"), capture_output=True, text=True, timeout=250, check=True)
    report = json.loads(done.stdout)
    assert report["steps"] == STEPS
    assert report["seconds_a_step"] > 0.0
    assert report["predicted_step_s"] is None
    assert report["not_predicted"].startswith("measurements")  # nothing was profiled
    source, seen = random.Random(1), 0
    for _ in range(KILLS):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        state = tmp_path / "killed.state"
        deadline = time.monotonic() + 120.0
        while process.poll() is None and time.monotonic() < deadline:
            found = latest(state) if state.exists() else None
            if found is not None and read_notes(found)["step"] > seen:  # it came further than the one before
                seen = read_notes(found)["step"]
                break
            time.sleep(0.02)
        time.sleep(source.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    subprocess.run(command("killed"), capture_output=True, text=True, timeout=250, check=True)
    assert records(tmp_path / "killed.state") == records(tmp_path / "whole.state")
    assert len(records(tmp_path / "killed.state")) == STEPS
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(prompts(60))
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("whole", "killed")
    ]
    with torch.inference_mode():
        whole, killed = (model(ids).logits for model in models)
    assert torch.equal(whole, killed)
    assert not [path for path in tmp_path.rglob("state-*") if path.parent.parent == tmp_path]
    again = subprocess.run(command("whole"), capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 2
    assert "--output" in again.stderr

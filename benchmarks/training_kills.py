"""Kills `isochunk train` at random moments and lets it go on: the curve must be that of a training left alone.

python -m benchmarks.training_kills [--kills 20] [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.trained_model import begin
from db.files.documents import write_json
from profiler.model import load_model_shape
from runtime.run.prompts import random_prompts
from runtime.train.saving import latest, read_notes
from service.cli.output import print_table
from tuner.plan.plan import Chunk, Parallel, Plan, Request

LENGTH, CHUNK = 256, 64
SAVE_EVERY = 5
MIDWAY = 0.8  # share of the kills that wait until the training has saved something; the others may hit its start
WAIT_S = 300.0


def main() -> None:
    """Train alone, train with kills, compare every step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = prepared(folder, options.steps)
        started = time.monotonic()
        subprocess.run([*command, "-o", str(folder / "alone")], check=True, capture_output=True)
        alone_s = time.monotonic() - started
        source = random.Random(options.seed)
        reached: list[int] = []
        while len(reached) < options.kills:
            process = subprocess.Popen(
                [*command, "-o", str(folder / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                if source.random() < MIDWAY:
                    await_progress(process, folder / "killed.state")
                process.wait(timeout=source.uniform(0.0, 2.0 * SAVE_EVERY / options.steps) * alone_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                reached.append(steps_of(folder / "killed.state"))
            else:  # it was done: begin anew, so that there is something to kill
                compare(folder)
                shutil.rmtree(folder / "killed")
                shutil.rmtree(folder / "killed.state")
        if not (folder / "killed").exists():
            subprocess.run([*command, "-o", str(folder / "killed")], check=True, capture_output=True)
        worst = compare(folder)
    rows = [(number + 1, step) for number, step in enumerate(reached)]
    print_table(("kill", "steps kept"), rows, title=f"{options.kills} kills; losses differ by {worst} at most")


def prepared(folder: Path, steps: int) -> list[str]:
    """The command, but for its output."""
    weights = begin(folder / "begun", 0)
    shape = load_model_shape(str(weights))
    plan = Plan(
        model=dict(shape.config), precision="float32", parallel=Parallel(tp_size=1, pp_size=2, layer_partition=(2, 2)),
        requests=(Request(id="r0", prompt_tokens=LENGTH), Request(id="r1", prompt_tokens=LENGTH)),
        rounds=tuple((Chunk(0, at, CHUNK), Chunk(1, at, CHUNK)) for at in range(0, LENGTH, CHUNK)),
    )  # fmt: skip
    write_json(folder / "plan.json", plan.to_json())
    (ids,) = random_prompts((Request(id="all", prompt_tokens=20_000),), shape.vocab_size)
    (folder / "data.jsonl").write_text(json.dumps({"id": "0", "token_ids": list(ids)}) + "\n")
    return [
        sys.executable, "-m", "service", "train", str(folder / "plan.json"), "--weights", str(weights), "--data",
        str(folder / "data.jsonl"), "--steps", str(steps), "--learning-rate", "1e-3", "--save-every", str(SAVE_EVERY),
        "--device", "cpu", "--threads-per-rank", "1",
    ]  # fmt: skip


def await_progress(process: subprocess.Popen[bytes], state: Path) -> None:
    """Until a checkpoint is there that was not, or the training is done."""
    before, limit = steps_of(state), time.monotonic() + WAIT_S
    while steps_of(state) == before and process.poll() is None:
        if time.monotonic() > limit:
            raise SystemExit(f"no checkpoint after step {before} in {WAIT_S:.0f} s")
        time.sleep(0.01)


def steps_of(state: Path) -> int:
    """Steps that the newest checkpoint has."""
    found = latest(state) if state.exists() else None
    return 0 if found is None else int(found.name.removeprefix("step-"))


def compare(folder: Path) -> float:
    """The largest difference between the losses of both trainings."""

    def records(name: str) -> list[dict[str, Any]]:
        found = latest(folder / f"{name}.state")
        assert found is not None
        kept: list[dict[str, Any]] = read_notes(found)["records"]
        return kept

    alone, killed = records("alone"), records("killed")
    assert len(alone) == len(killed)
    return max(abs(float(one["loss"]) - float(other["loss"])) for one, other in zip(alone, killed, strict=True))


if __name__ == "__main__":
    main()

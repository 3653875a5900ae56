"""Kills, stops and ends ranks and launchers of `isochunk run-plan` at random moments, and counts what came of it.

    python -m benchmarks.faults [--faults N] [--device cpu|cuda] [--seed N] [--output FILE]

Every fault must end in time with one line that names the rank, leave no process behind, and leave a database that the
next run works with. A launcher that is stopped goes on after two seconds and must end well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from profiler.comm.ranks.mark import Phase, Progress
from service.cli.output import print_table

SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
LAYOUTS = {"cpu": ((1, 2), (1, 3), (2, 1), (2, 2)), "cuda": ((1, 2), (2, 1))}  # (TP, PP)
STALL_S = 3.0
ENDS_WITHIN_S = 20.0 + STALL_S
STOPPED_S = 2.0
MARK = "ISOCHUNK_FAULTS"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One fault and what came of it; `problems` is empty when all was as it must be."""

    layout: str
    target: str
    signal: str
    after_s: float
    came: bool  # False: the run had ended before
    took_s: float  # from the fault to the end of the command
    line: str
    problems: tuple[str, ...]


def make_plan(tp_size: int, pp_size: int) -> dict[str, Any]:
    """A plan of many short rounds, with requests that keep arriving for some seconds."""
    layers = [4 // pp_size + (stage < 4 % pp_size) for stage in range(pp_size)]
    arrivals = [0.0, 0.0, *(0.3 * step for step in range(1, 12))]
    requests = [
        {"id": f"r{index}", "prompt_tokens": 96, "arrival_s": arrival} for index, arrival in enumerate(arrivals)
    ]
    rounds = [
        [{"request": index, "start": start, "tokens": 32}] for index in range(len(requests)) for start in (0, 32, 64)
    ]
    return {
        "schema": "isochunk.plan/1", "model": CONFIG | {"name": "faults"}, "precision": "float32",
        "parallel": {"tp_size": tp_size, "pp_size": pp_size, "layer_partition": layers},
        "requests": requests, "rounds": rounds, "window": pp_size + 1,
    }  # fmt: skip


class Trial:
    """One run of the command in a folder, found again by a mark in its environment."""

    def __init__(self, folder: Path, device: str, plan: Path) -> None:
        self.folder = folder
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "run-plan", plan, "--random-weights", "--device", device,
             "--stall-timeout-s", str(STALL_S), "--db", f"sqlite:///{folder / 'runs.db'}", "--max-new-tokens", "4"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {MARK: self.mark, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> list[int]:
        """All processes of the run, the launcher's first."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def runs_rounds(self) -> bool:
        """Whether a rank has come to its rounds."""
        marks = (Progress.read_file(path) for path in self.folder.glob("isochunk-*/progress-*"))
        return any(mark is not None and mark.phase is Phase.RUN for mark in marks)

    def ranks(self) -> list[int]:
        """Processes of ranks that have begun, by rank."""
        found = {}
        for pid in self.processes():
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("isochunk-r"):
                    found[pid] = pid
            except OSError:
                continue
        return sorted(found)


def try_fault(folder: Path, device: str, draw: random.Random) -> Outcome:
    """Start a run, do one thing to it, and look at what is left."""
    tp_size, pp_size = draw.choice(LAYOUTS[device])
    plan = folder / f"plan-{tp_size}-{pp_size}.json"
    plan.write_text(json.dumps(make_plan(tp_size, pp_size)))
    trial = Trial(folder, device, plan)
    began = time.monotonic()
    number, at_launcher = draw.choice(SIGNALS), draw.random() < 0.3
    # Half of them while rounds run, half at any moment of the start.
    in_rounds, after_s = draw.random() < 0.5, draw.uniform(0.0, 3.0)
    if in_rounds:
        while not trial.runs_rounds() and trial.process.poll() is None:
            time.sleep(0.01)
        after_s += time.monotonic() - began
    else:
        after_s *= 3.0
    while time.monotonic() - began < after_s and trial.process.poll() is None:
        time.sleep(0.01)
    ranks = trial.ranks()
    rank = draw.randrange(len(ranks)) if ranks else 0
    at_launcher = at_launcher or not ranks
    came = trial.process.poll() is None
    if came:
        os.kill(trial.process.pid if at_launcher else ranks[rank], number)
    struck = time.monotonic()
    if came and at_launcher and number is signal.SIGSTOP:
        time.sleep(STOPPED_S)
        trial.process.send_signal(signal.SIGCONT)
    problems = []
    try:
        _, err = trial.process.communicate(timeout=ENDS_WITHIN_S + (15.0 if at_launcher or not came else 0.0))
    except subprocess.TimeoutExpired:
        problems.append("did not end")
        for pid in trial.processes():
            os.kill(pid, signal.SIGKILL)
        _, err = trial.process.communicate()
    took_s = time.monotonic() - struck
    time.sleep(0.5)  # the kernel's own time to end orphans
    if left := trial.processes():
        problems.append(f"{len(left)} processes left")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    lines = [line for line in err.splitlines() if line.strip()]
    code = trial.process.returncode
    ends_well = not came or (at_launcher and number is signal.SIGSTOP)
    if ends_well and code != 0:
        problems.append(f"exit code {code}: {lines[-1:]}")
    if not ends_well and not at_launcher and code == 0:
        came = False  # the rank had done its part
    elif not ends_well and not at_launcher and (code != 1 or len(lines) != 1 or f"rank {rank}" not in lines[0]):
        problems.append(f"exit code {code}, {len(lines)} lines: {lines[-2:]}")
    had_begun = code != -signal.SIGTERM  # Python itself was still starting
    if at_launcher and came and number is signal.SIGTERM and had_begun and (code != 143 or len(lines) != 1):
        problems.append(f"exit code {code}, {len(lines)} lines: {lines[-2:]}")
    problems += check_database(folder)
    return Outcome(
        layout=f"TP{tp_size} PP{pp_size}",
        target="launcher" if at_launcher else "rank",
        signal=number.name,
        after_s=after_s,
        came=came,
        took_s=took_s,
        line=lines[-1] if lines else "",
        problems=tuple(problems),
    )


def check_database(folder: Path) -> list[str]:
    """What is wrong with the database of the runs."""
    from db.rows.runs import RunStatus, list_runs
    from db.store.engine import open_database

    path = folder / "runs.db"
    if not path.exists():
        return []
    with sqlite3.connect(path) as connection:
        (answer,) = connection.execute("PRAGMA integrity_check").fetchone()
    with open_database(f"sqlite:///{path}") as database:
        running = [run for run in list_runs(database) if run.status is RunStatus.RUNNING]
    return ([] if answer == "ok" else [f"database: {answer}"]) + (["a run still says running"] if running else [])


def main() -> None:
    """Do the faults one after another; exit code 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    draw, outcomes = random.Random(options.seed), []
    with TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        for index in range(options.faults):
            outcome = try_fault(folder, options.device, draw)
            outcomes.append(outcome)
            state = "; ".join(outcome.problems) or ("as it must be" if outcome.came else "had ended")
            print(f"{index + 1:4} {outcome.layout} {outcome.signal} of {outcome.target} after {outcome.after_s:.1f} s: "
                  f"{outcome.took_s:.1f} s, {state} | {outcome.line}", flush=True)  # fmt: skip
        last = Trial(folder, options.device, next(folder.glob("plan-*.json")))
        last.process.communicate(timeout=120)
        left = [path.name for path in folder.glob("isochunk-*") if path.is_dir()]
    rows = []
    for key, count in sorted(Counter((one.signal, one.target) for one in outcomes).items()):
        same = [one for one in outcomes if (one.signal, one.target) == key]
        came = [one for one in same if one.came]
        slowest = max((one.took_s for one in came), default=None)
        rows.append([*key, count, len(came), sum(not one.problems for one in same), slowest])
    print_table(("signal", "to a", "faults", "while it ran", "as it must be", "slowest end s"), rows)
    print(f"the run after all of them: exit code {last.process.returncode}, folders left: {len(left)}")
    if options.output:
        options.output.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    sys.exit(any(one.problems for one in outcomes) or last.process.returncode or bool(left))


if __name__ == "__main__":
    main()

"""Kills service, workers and PostgreSQL at random moments while jobs run: `python -m benchmarks.service_kills`.

    python -m benchmarks.service_kills [--kills 50] [--seed 0] [--pause-s 20]

A PostgreSQL server of its own, a service and workers of two machines with different hardware, all started again by a
loop as a supervisor would. Jobs are handed in over HTTP, each a run of a plan of its own, so that the database tells
how often each ran. Every second kill of a worker waits for the moment at which one of its jobs has ended, before the
worker can note that. After the last kill everything is left to end. Prints what came of the jobs; exit code 1 if one
that was acknowledged is lost, ran on the wrong machine, ran twice at the same time, ran to its end twice, or left
anything half-written.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, select

from benchmarks.demo_model import SMALL, write_demo_model
from db.errors import UserError
from db.rows.plans import save_plan_row
from db.rows.runs import RunStatus, StoredRun, list_runs
from db.rows.tokens import save_token
from db.store.engine import Database, open_database
from db.store.tables import JobEndRow
from profiler.model import load_model_shape
from service.cli.output import print_table
from service.http.client import Client
from service.http.door.access import hash_of, random_token
from service.jobs.queue import JobQueue
from tuner.plan.plan import Chunk, Parallel, Plan, Request

MACHINES = ("left", "right")
LIVE_JOBS = 4
ENDS_WITHIN_S = 420.0
NEXT_END_WITHIN_S = 30.0
PORT = 8397


@dataclass(slots=True)
class Kept:
    """A process that is started again when it is gone."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    not_before: float = 0.0
    starts: int = 0

    def keep(self) -> None:
        """Start it if it is gone, at most once a second."""
        if (self.process is None or self.process.poll() is not None) and time.monotonic() >= self.not_before:
            self.process, self.not_before = self.start(), time.monotonic() + 1.0
            self.starts += 1

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(20)


@dataclass(slots=True)
class Postgres:
    """A server of our own whose main process may be killed."""

    folder: Path
    binaries: Path
    as_user: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Of its one database."""
        return f"postgresql+psycopg://isochunk@/postgres?host={self.folder}"

    def make(self) -> None:
        """Make its files and start it."""
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self.as_user = ["runuser", "-u", "postgres", "--"]
        options = ["-U", "isochunk", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(
            [*self.as_user, str(self.binaries / "initdb"), "-D", str(self.folder / "data"), *options],
            check=True, cwd=self.folder, stdout=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it; after a kill its children may take a moment to go."""
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c max_connections=80"
        words = ["-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-o", settings, "-w", "-t", "60", "start"]
        for _ in range(30):
            done = subprocess.run(
                [*self.as_user, str(self.binaries / "pg_ctl"), *words], cwd=self.folder, capture_output=True, timeout=90
            )
            if done.returncode == 0:
                return
            time.sleep(1.0)
        raise SystemExit("PostgreSQL does not start again")

    def kill(self) -> None:
        """Kill its main process; the others end by themselves."""
        os.kill(int((self.folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)


@dataclass(slots=True)
class Jobs:
    """Jobs that the service acknowledged, with the machine and the plan of each."""

    client: Client
    url: str
    model: dict[str, Any]
    known: dict[str, tuple[str, int]] = field(default_factory=dict)
    asked: int = 0

    def hand_in(self, draw: random.Random) -> None:
        """Hand one in where few are live; what is away is asked again later."""
        try:
            live = sum(job["status"] in ("queued", "running") for job in self.client.get("jobs", limit=50)["items"])
            if live >= LIVE_JOBS:
                return
            self.asked += 1
            with open_database(self.url) as database:
                plan_id = save_plan_row(database, _plan(self.asked, self.model).to_json())
            machine = draw.choice(MACHINES)
            options = {"random_weights": True, "threads_per_rank": 1}
            body = {"kind": "run-plan", "plan_id": plan_id, "hardware": f"{machine} x1", "options": options}
            self.known[self.client.post("jobs", body)["id"]] = machine, plan_id
        except UserError:
            return


def main(num_kills: int, seed: int, pause_s: float) -> int:
    """Kill, wait, count -> the exit code."""
    draw = random.Random(seed)
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    (folder / "pg").mkdir()
    postgres = Postgres(folder=folder / "pg", binaries=binaries)
    folder.chmod(0o755)
    postgres.make()
    write_demo_model(folder / "models" / "tiny", SMALL)
    kept: list[Kept] = []
    try:
        with open_database(postgres.url) as database:
            token = random_token()
            save_token(database, "kills", hash_of(token), "read,plan,run")
        kept = [Kept("service", lambda: _start(folder, postgres.url, "serve", "--port", str(PORT), "--no-worker"))]
        for machine in MACHINES:
            words = ("worker", "--device", "cpu", "--hardware", machine, "--machine", f"{folder.name}-{machine}")
            kept.append(Kept(machine, partial(_start, folder, postgres.url, *words)))
        shape = load_model_shape(str(folder / "models" / "tiny"))
        jobs = Jobs(
            client=Client.at(f"http://127.0.0.1:{PORT}/#token={token}"),
            url=postgres.url,
            model={**shape.config, "name": shape.name},
        )
        targets = _kill_at_random(num_kills, pause_s, draw, kept, postgres, jobs)
        found = _wait(jobs, kept)
        problems, rows = _judge(jobs, found, postgres.url)
        print_table(("killed", "times"), sorted(targets.items()))
        print_table(("jobs", "number"), rows)
        for line in problems:
            print(line)
        return 1 if problems else 0
    finally:
        for one in kept:
            one.kill()
        postgres.kill()
        time.sleep(1.0)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_at_random(
    num_kills: int, pause_s: float, draw: random.Random, kept: list[Kept], postgres: Postgres, jobs: Jobs
) -> Counter[str]:
    targets: Counter[str] = Counter()
    while sum(targets.values()) < num_kills:
        until = time.monotonic() + draw.uniform(1.0, pause_s)
        while time.monotonic() < until:
            for one in kept:
                one.keep()
            jobs.hand_in(draw)
            time.sleep(0.3)
        target = draw.choice([*(one.name for one in kept), "PostgreSQL"])
        if target in MACHINES and draw.random() < 0.5 and (ended := _next_end(jobs, kept, draw)):
            target = ended
            targets["left or right, as its job ended"] += 1
        else:
            targets[target] += 1
        print(f"kill {sum(targets.values())}: {target}; {len(jobs.known)} jobs so far", file=sys.stderr, flush=True)
        if target == "PostgreSQL":
            postgres.kill()
            time.sleep(draw.uniform(0.0, 3.0))
            postgres.start()
        else:
            next(one for one in kept if one.name == target).kill()
    return targets


def _next_end(jobs: Jobs, kept: list[Kept], draw: random.Random) -> str | None:
    """The machine whose job has just ended, None where none does within a while."""
    deadline = time.monotonic() + NEXT_END_WITHIN_S
    with open_database(jobs.url) as database:
        known = set(_ends(database))
        while time.monotonic() < deadline:
            for job in set(_ends(database)) - known:
                return jobs.known[job][0]
            for one in kept:
                one.keep()
            time.sleep(0.005)
            if draw.random() < 0.02:
                jobs.hand_in(draw)
    return None


def _ends(database: Database) -> Sequence[str]:
    with database.reading() as session:
        return session.scalars(select(JobEndRow.job)).all()


def _wait(jobs: Jobs, kept: list[Kept]) -> dict[str, dict[str, Any]]:
    """What came of each job, once all are over or it takes too long."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    found: dict[str, dict[str, Any]] = {}
    while time.monotonic() < deadline and len(found) < len(jobs.known):
        for one in kept:
            one.keep()
        for job_id in jobs.known.keys() - found.keys():
            try:
                job = jobs.client.get(f"jobs/{job_id}")
            except UserError:
                break
            if job["status"] not in ("queued", "running"):
                found[job_id] = job
        time.sleep(1.0)
    return found


def _judge(jobs: Jobs, found: dict[str, dict[str, Any]], url: str) -> tuple[list[str], list[tuple[object, ...]]]:
    queue = JobQueue(make_url(url))
    problems, twice, given_up, noted_late, refused = [], 0, 0, 0, 0
    with open_database(url) as database:
        database.check()
        runs, ends = list_runs(database), set(_ends(database))
    for job_id, (machine, plan_id) in jobs.known.items():
        job = found.get(job_id)
        if job is None:
            problems.append(f"job {job_id}: not over within {ENDS_WITHIN_S:g} s")
            continue
        mine = sorted((run for run in runs if run.plan_id == plan_id), key=lambda run: run.started_at)
        done = [run for run in mine if run.status is RunStatus.DONE]
        refused += sum("has ended already" in str(run.error) for run in mine)
        said = [line for batch in queue.log(job_id, 0) for line in batch["lines"]]
        noted_late += any(line.endswith(" notes that it has ended") for line in said)
        if len(done) > 1:
            twice += 1
            problems.append(f"job {job_id}: ran to its end {len(done)} times")
        if job_id not in ends:
            problems.append(f"job {job_id}: over without an end of its own")
        given_up += job["status"] == "failed" and "ended without a word" in str(job["error"])
        if job["status"] == "done" and not done:
            problems.append(f"job {job_id}: done without a run")
        if job["status"] == "failed" and "ended without a word" not in str(job["error"]):
            problems.append(f"job {job_id}: failed: {job['error']}")
        if job["worker"] and not job["worker"].endswith(f"-{machine}"):
            problems.append(f"job {job_id}: for {machine}, by {job['worker']}")
        if any(run.status is RunStatus.RUNNING for run in mine):
            problems.append(f"job {job_id}: a run that never ended")
        problems += [f"job {job_id}: ran twice at once" for one, other in pairwise(mine) if _overlap(one, other)]
    queue.close()
    rows: list[tuple[object, ...]] = [
        ("acknowledged", len(jobs.known)),
        ("done", sum(job["status"] == "done" for job in found.values())),
        ("taken up again", sum(job["attempts"] > 1 for job in found.values())),
        ("given up with the reason, after four workers", given_up),
        ("taken up after its end, and not run again", noted_late),
        ("run to its end twice", twice),
        ("second runs refused at their end", refused),
        ("lost", len(jobs.known) - len(found)),
    ]
    return problems, rows


def _overlap(one: StoredRun, other: StoredRun) -> bool:
    """Whether a run began before the one before it had ended; one that was lost ended when somebody noticed."""
    return one.status is RunStatus.DONE and one.finished_at is not None and other.started_at < one.finished_at


def _start(folder: Path, url: str, *words: str) -> subprocess.Popen[bytes]:
    models = ["--models", str(folder / "models")]
    environment = os.environ | {"ISOCHUNK_DB": url, "OMP_NUM_THREADS": "1"}
    with (folder / f"{re.sub('[^a-z]', '', words[-1])}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *words, *models], env=environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _plan(number: int, model: dict[str, Any]) -> Plan:
    """A plan that no other job has."""
    chunks = tuple((Chunk(request=0, start=16 * index, tokens=16),) for index in range(8))
    return Plan(
        model=model,
        precision="float32",
        parallel=Parallel(tp_size=1, pp_size=1, layer_partition=(model["num_hidden_layers"],)),
        window=None,
        requests=(Request(id=f"job{number}", prompt_tokens=128),),
        rounds=chunks,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-s", type=float, default=20.0, help="From a kill to the next, at most.")
    given = parser.parse_args()
    sys.exit(main(given.kills, given.seed, given.pause_s))

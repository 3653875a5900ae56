"""How long the service takes to list what is kept of a million measurements and 100,000 runs.

    python -m benchmarks.service_lists [--db URL]

Fills an empty database, asks for a first page, a page of one hardware and a page from the middle of each list through
the whole application, guard and JSON included, and prints milliseconds of the median and of the slowest of 20.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert
from starlette.testclient import TestClient

from db.rows.hardware import Hardware, save_hardware
from db.store.engine import Database, open_database
from db.store.tables import FitRow, MeasurementRow, PlanRow, RoundTimeRow, RunKind, RunRow, RunStatus, Source
from service.cli.declared import job_options
from service.cli.output import print_table
from service.http.application import make_application
from service.http.door.access import Access
from service.http.pages import cursor_of
from service.http.planning.processes import Planning, PlanningLimits
from service.http.state import Service
from service.jobs.queue import JobQueue

_HARDWARE = 8
_MEASUREMENTS = 1_000_000
_RUNS = 100_000
_PLANS = 10_000
_AT_ONCE = 20_000
_CALLS = 20
_NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def main(db_url: str | None) -> None:
    """Fill, ask, print."""
    with tempfile.TemporaryDirectory(prefix="lists-") as folder:
        with open_database(db_url or f"sqlite:///{folder}/rows.db") as database:
            _fill(database)
            rows = _ask(database)
        print_table(("list", "median ms", "slowest ms", "bytes"), rows, title=f"{_MEASUREMENTS} points, {_RUNS} runs")


def _ask(database: Database) -> list[tuple[object, ...]]:
    access = Access()
    service = Service(
        database=database,
        access=access,
        planning=Planning(PlanningLimits(processes=1)),
        jobs=JobQueue(database.url),
        model_folders=(),
    )
    app = make_application(service, job_options(), hosts=["testserver"])
    headers = {"authorization": f"Bearer {access.make_token()}"}
    middle = cursor_of(_RUNS // 2)
    paths = [
        "hardware", "measurements", "measurements?hardware=3", "measurements?hardware=3&op=op1",
        f"measurements?hardware=3&op=op1&cursor={cursor_of(_MEASUREMENTS // 2)}", "measurements?op=op1&limit=200",
        "measurements?op=none",
        "runs", "runs?hardware=3&limit=200", f"runs?hardware=3&cursor={middle}", "runs?plan=5", f"runs/{_RUNS // 2}",
        f"runs/{_RUNS // 2}/rounds", "plans", "plans?hardware=3", f"plans?cursor={cursor_of(_PLANS // 2)}",
        "fits?hardware=3", "jobs", "workers",
    ]  # fmt: skip
    found: list[tuple[object, ...]] = []
    client = TestClient(app, headers=headers)
    for path in paths:
        times, size = [], 0
        for _ in range(_CALLS):
            began = time.perf_counter()
            answer = client.get(f"/api/v1/{path}")
            times.append(1e3 * (time.perf_counter() - began))
            assert answer.status_code == 200, (path, answer.text)
            size = len(answer.content)
        found.append((path, round(statistics.median(times), 1), round(max(times), 1), size))
    service.planning.close()
    service.jobs.close()
    return found


def _fill(database: Database) -> None:
    for number in range(_HARDWARE):
        save_hardware(
            database,
            Hardware(
                device=f"device {number}", device_count=2, memory_bytes=2**36, driver="1", torch_version="2",
                backend="gloo", num_threads=1, link="any",
            ),
        )  # fmt: skip
    with database.session() as session:
        for first in range(0, _MEASUREMENTS, _AT_ONCE):
            session.execute(insert(MeasurementRow), [_measurement(first + number) for number in range(_AT_ONCE)])
        session.execute(insert(PlanRow), [_plan(number) for number in range(_PLANS)])
        session.execute(insert(FitRow), [_fit(number) for number in range(500)])
        for first in range(0, _RUNS, _AT_ONCE):
            session.execute(insert(RunRow), [_run(first + number) for number in range(_AT_ONCE)])
        rounds = [
            {"run_id": _RUNS // 2, "round": index, "stage": stage, "predicted_s": 1.0, "start_s": index,
             "finish_s": index + 1}
            for index in range(100)
            for stage in range(4)
        ]  # fmt: skip
        session.execute(insert(RoundTimeRow), rounds)


def _measurement(number: int) -> dict[str, Any]:
    return {
        "hardware_id": 1 + number % _HARDWARE, "op": f"op{number // _HARDWARE % 12}", "dtype": "bfloat16",
        "shape": {"m": number // 100 + 1, "n": number % 1000 + 1, "k": 512}, "group_size": 1, "busy_ranks": 1,
        "variant": "", "num_samples": 20, "median_us": 10.0, "p10_us": 9.0, "p90_us": 11.0, "min_us": 8.0,
        "std_us": 0.5, "noisy": False, "measured_at": _NOON + timedelta(seconds=number),
        "code_version": "1", "source": Source.PROFILE,
    }  # fmt: skip


def _plan(number: int) -> dict[str, Any]:
    chunks = [[{"request": 0, "start": 512 * index, "tokens": 512}] for index in range(32)]
    plan = {
        "schema": "isochunk.plan/1", "model": {"name": "any"}, "precision": "bfloat16", "policy": "joint",
        "parallel": {"tp_size": 1, "pp_size": 4, "layer_partition": [8, 8, 8, 8]}, "number": number,
        "requests": [{"id": "a", "prompt_tokens": 16384}], "rounds": chunks, "predicted": {"makespan_s": 1.0},
    }  # fmt: skip
    return {"id": number + 1, "content_hash": f"{number:064x}", "plan": plan, "hardware_id": 1 + number % _HARDWARE,
            "created_at": _NOON, "code_version": "1"}  # fmt: skip


def _run(number: int) -> dict[str, Any]:
    return {
        "id": number + 1, "plan_id": 1 + number % _PLANS, "hardware_id": 1 + number % _HARDWARE,
        "kind": RunKind.RUN_PLAN, "status": RunStatus.DONE, "details": {}, "started_at": _NOON, "finished_at": _NOON,
        "makespan_s": 1.0 + number % 7, "predicted_makespan_s": 1.1 + number % 7, "mfu": 0.4, "ttft_s": [1.0] * 8,
        "code_version": "1",
    }  # fmt: skip


def _fit(number: int) -> dict[str, Any]:
    report = {"held_out": [{"op": f"op{index}", "median": 0.01} for index in range(12)]}
    return {"hardware_id": 1 + number % _HARDWARE, "model_name": "any", "dtype": "bfloat16", "cost_model": {},
            "report": report, "created_at": _NOON, "code_version": "1"}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", metavar="URL", help="An empty database. [default: a SQLite file made for this]")
    main(parser.parse_args().db)

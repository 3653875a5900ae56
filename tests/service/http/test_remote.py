"""`isochunk --server URL`: the commands as they are, carried out by a service."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner

from db.errors import UserError
from service.cli.main import cli
from service.http.client import Client
from service.http.serve import listen
from tests.service.http.conftest import Served
from tests.service.test_tune import COST_MODEL
from tuner.plan.plan import load_plan

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[str]:
    """The address of a service that listens, with its token."""
    listener = listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(served.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    token = served.client.headers["authorization"].removeprefix("Bearer ")
    yield f"http://localhost:{listener.getsockname()[1]}/#token={token}"
    running.should_exit = True
    thread.join(30)


def called(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False).stdout


def test_tune_elsewhere_is_tune_here(server: str, tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(json.dumps(COST_MODEL))
    arguments = ("tune", "--cost-model", str(tmp_path / "cost.json"), "--pp-size", "4", "--prompt-lens", "65536,4096")
    here = json.loads(called(*arguments, "--json"))
    there = json.loads(called("--server", server, *arguments, "--json", "-o", str(tmp_path / "plan.json")))
    assert there["plan"]["rounds"] == here["plan"]["rounds"]
    assert load_plan(tmp_path / "plan.json").rounds
    assert f"Kept as plan {there['plan_id'] + 1} of" in called(
        "--server", server, *arguments, "--objective", "mean-ttft"
    )


def test_a_trace_and_a_measured_model_are_planned_elsewhere(server: str, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text('{"input_length": 900}\n{"input_length": 300, "timestamp": 5.0, "more": 1}\n')
    given = ("llama-3.2-1b", "--world-size", "2", "--hardware", "1", "--dtype", "float32")
    text = called("--server", server, "tune", *given, "--workload", str(tmp_path / "trace.jsonl"))
    assert "Layouts, the best first" in text


def test_models_and_lists_are_read_and_plans_exported_elsewhere(server: str, served: Served, tmp_path: Path) -> None:
    names = {row["name"] for row in json.loads(called("--server", server, "models", "--json"))}
    assert {"tiny", "llama-3-8b"} <= names
    body = {"cost_model": COST_MODEL, "pp_size": 2, "prompt_lens": "9000"}
    plan_id = served.client.post("/api/v1/plans", json=body).json()["plan_id"]
    called("--server", server, "export", str(plan_id), "--engine", "sglang", "-o", str(tmp_path / "launch"))
    assert "--pp-size=2" in (tmp_path / "launch" / "launch.sh").read_text()
    rows = json.loads(called("--server", server, "db", "list", "hardware", "--json"))
    assert rows[0]["device"] == "imaginary"
    assert "imaginary" in called("--server", server, "db", "list")
    assert len(json.loads(called("--server", server, "db", "list", "measurements", "--limit", "150", "--json"))) == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "llama-3.2-1b", "--prompt-lens", "x"), "--prompt-lens: x; must be a whole number"),
        (("tune", "no-model", "--prompt-lens", "1"), "model: no-model; must be one of"),
        (("serve",), "--server: serve; carries out"),
        (("run-plan", "plan.json"), "PLAN: plan.json; must be the id of a plan"),
        (("run-plan", "1", "--check"), "--check: True; is for runs on this machine"),
        (("db", "list", "processes"), "WHAT: processes; must be one of"),
        (("profile", "no-model"), "model: no-model; must be one of"),
    ],
)
def test_what_is_refused_there_is_told_here(server: str, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as refused:
        called("--server", server, *arguments)
    assert str(refused.value).startswith(message)


def test_a_service_that_is_none_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISOCHUNK_TOKEN", raising=False)
    home = server.partition("#")[0]
    for address, message in (
        ("nowhere", "must be http://HOST:PORT"),
        (home, "ISOCHUNK_TOKEN: missing"),
        (f"{home}#token=wrong", "must be Bearer and a token"),
        ("http://127.0.0.1:1/#token=x", "cannot be reached"),
    ):
        with pytest.raises(UserError, match=message):
            called("--server", address, "db", "list")


def test_a_job_is_followed_to_its_end(server: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.jobs.job import JobStatus

    found: dict[str, Any] = {}
    run = CliRunner().invoke
    thread = threading.Thread(target=lambda: found.update(done=run(cli, ["--server", server, "profile", "tiny"])))
    thread.start()
    deadline = time.monotonic() + 60
    while not (jobs := served.service.jobs.page(limit=1)) and time.monotonic() < deadline:
        time.sleep(0.1)
    served.service.jobs.cancel(jobs[0].id)
    thread.join(60)
    assert found["done"].exit_code == 1
    assert served.service.jobs.page(limit=1)[0].status is JobStatus.CANCELLED


def test_the_token_is_not_told_when_a_client_is_shown() -> None:
    assert "secret" not in repr(Client.at("http://localhost:1/#token=secret"))

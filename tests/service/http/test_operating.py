"""What operators read: health, figures and a line a request."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.cli.main import cli
from service.jobs.log import Log
from tests.service.http.conftest import Served
from tests.structures import ROOT, modules


def test_figures_count_requests_by_route_and_say_what_waits(served: Served) -> None:
    assert served.nobody.get("/metrics").status_code == 401
    assert served.client.get("/readyz").json() == {"status": "ok"}
    for _ in range(3):
        assert served.client.get("/api/v1/runs/123456").status_code == 404
    text = served.client.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    counted = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for sample in found["isochunk_http_requests"].samples
        if sample.name.endswith("_total")
    }
    assert counted["/api/v1/runs/{run_id}", "404"] >= 3
    assert not any("123456" in route for route, _ in counted)
    assert found["isochunk_workers"].samples[0].value == 1
    assert {sample.labels["status"] for sample in found["isochunk_jobs"].samples} == {"queued", "running"}
    assert "process_resident_memory_bytes" in found


def test_events_are_words_for_people_or_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    Log().say("request", None, ms=1.0)
    Log().say("ends", "it ends")
    Log(as_json=True).say("request", None, route="/x", ms=1.0)
    plain, parsed = capsys.readouterr().err.splitlines()
    assert plain == "it ends"
    assert {"event": "request", "route": "/x", "ms": 1.0}.items() <= json.loads(parsed).items()


def test_traces_files_for_engines_and_coverage_are_told(served: Served) -> None:
    body = {"model": "llama-3.2-1b", "tp_size": 2, "pp_size": 1, "prompt_lens": "3000"}
    plan_id = served.client.post("/api/v1/plans", json=body).json()["plan_id"]
    files = served.client.get(f"/api/v1/plans/{plan_id}/export/trtllm/files")
    assert files.headers["content-type"] == "application/zip"
    assert files.content.startswith(b"PK")
    rows = served.client.get("/api/v1/hardware/1/coverage", params={"model": "llama-3.2-1b"}).json()
    assert {row["op"] for row in rows} >= {"matmul", "attention"}
    assert all(0 <= row["num_kept"] <= row["num_points"] for row in rows)
    assert any(row["num_kept"] for row in rows)
    assert served.client.get("/api/v1/hardware/1/coverage", params={"model": "../etc"}).status_code == 422
    assert served.client.get("/api/v1/hardware/99/coverage", params={"model": "llama-3.2-1b"}).status_code == 422
    assert served.client.get("/api/v1/runs/99/trace").status_code == 404


def test_what_is_deployed_starts_with_options_that_the_commands_have() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    unit = (ROOT / "deploy" / "isochunk.service").read_text()
    started = [compose["services"][name]["command"] for name in ("service", "worker")]
    started.append(unit.partition("ExecStart=/opt/isochunk/bin/isochunk ")[2].partition("\n")[0])
    for line in started:
        name, *words = shlex.split(line.replace("${ALLOW_HOST:-localhost}", "localhost"))
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parsed = command.make_context(name, words).params
        assert parsed["log"] == "json", line
        assert parsed["models"] in ("/models", "/srv/models")


def test_what_is_deployed_names_nothing_that_does_not_exist(tmp_path: Path) -> None:
    deploy = ROOT / "deploy"
    dockerfile, compose, unit = (
        (deploy / name).read_text() for name in ("Dockerfile", "compose.yaml", "isochunk.service")
    )
    code = "".join(path.read_text() for folder in ("db", "service") for path in modules(folder))
    named = set(re.findall(r"ISOCHUNK_[A-Z_]+", dockerfile + compose + unit))
    assert named == {"ISOCHUNK_DB"}
    assert all(f'"{name}"' in code for name in named)
    for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", dockerfile)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(known["optional-dependencies"])
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[0])[0] in known["scripts"]
    services = yaml.safe_load(compose)["services"]
    assert services["service"]["build"] == services["worker"]["build"] == {
        "context": "..", "dockerfile": "deploy/Dockerfile",
    }  # fmt: skip
    assert set(services["worker"]["depends_on"]) <= set(services)
    (tmp_path / "isochunk.service").write_text(unit.replace("/opt/isochunk/bin/isochunk", sys.executable))
    if shutil.which("systemd-analyze"):
        words = ["systemd-analyze", "verify", str(tmp_path / "isochunk.service")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")

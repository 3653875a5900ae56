"""Plans over HTTP: what the command line makes, with its errors, in pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from db.rows.plans import save_plan_row
from service.http.planning.processes import Planning, PlanningLimits
from service.http.planning.request import PlanRequest
from service.http.problems import RefusedError
from service.use_cases.tune import tune
from service.use_cases.tune_options import TuneOptions
from tests.service.http.conftest import Served
from tests.service.test_tune import COST_MODEL
from tuner.plan.plan import Plan

BATCH: dict[str, Any] = {"cost_model": COST_MODEL, "pp_size": 4, "prompt_lens": "65536,4096"}


def without_times(plan: dict[str, Any]) -> dict[str, Any]:
    return plan | {"predicted": {key: value for key, value in plan["predicted"].items() if key != "planning_s"}}


def test_a_plan_is_what_the_command_line_makes(served: Served, tmp_path: Path) -> None:
    made = served.client.post("/api/v1/plans", json=BATCH | {"compare": True})
    assert made.status_code == 201, made.text
    content = made.json()
    (tmp_path / "cost.json").write_text(json.dumps(COST_MODEL))
    options = TuneOptions(cost_model=str(tmp_path / "cost.json"), pp_size=4, prompt_lens="65536,4096", compare=True)
    expected = tune(options).to_json()
    assert without_times(content["report"]["plan"]) == without_times(json.loads(json.dumps(expected["plan"])))
    assert len(content["report"]["policies"]) == len(expected["policies"]) > 5
    plan_id = content["plan_id"]
    kept = served.client.get(f"/api/v1/plans/{plan_id}").json()
    assert kept["plan"] == content["report"]["plan"]
    assert kept["timeline"] == content["timeline"]
    assert kept["timeline"]["finish_s"][-1][-1] == pytest.approx(kept["plan"]["predicted"]["makespan_s"])
    file = served.client.get(f"/api/v1/plans/{plan_id}/file")
    assert f"plan-{plan_id}.json" in file.headers["content-disposition"]
    assert Plan.from_json(file.json()).policy == "joint"


def test_a_measured_model_is_planned_and_a_preview_keeps_nothing(served: Served) -> None:
    before, fits = served.client.get("/api/v1/plans").json(), served.client.get("/api/v1/fits").json()
    body = {"model": "llama-3.2-1b", "world_size": 2, "dtype": "float32", "hardware_id": 1, "prompt_lens": "3000"}
    preview = served.client.post("/api/v1/plans", json=body | {"keep": False})
    assert preview.status_code == 201, preview.text
    assert preview.json()["plan_id"] is None
    assert served.client.get("/api/v1/plans").json() == before
    assert served.client.get("/api/v1/fits").json() == fits
    kept = served.client.post("/api/v1/plans", json=body).json()
    assert {(layout["tp_size"], layout["pp_size"]) for layout in kept["report"]["layouts"]} >= {(1, 2), (2, 1)}
    assert kept["report"]["held_out"]
    assert served.client.get("/api/v1/plans?limit=1").json()["items"][0]["id"] == kept["plan_id"]
    assert served.client.get("/api/v1/fits").json()["items"][0]["model_name"] == "llama-3.2-1b"


def test_a_trace_is_planned_as_it_arrives(served: Served) -> None:
    lines = [{"input_length": 3000, "timestamp": 500.0 * i} for i in range(4)]
    made = served.client.post("/api/v1/plans", json={"cost_model": COST_MODEL, "pp_size": 2, "requests": lines})
    assert made.status_code == 201, made.text
    assert made.json()["report"]["replays"]
    assert [request["arrival_s"] for request in made.json()["report"]["plan"]["requests"]] == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("change", "field", "value", "allowed"),
    [
        ({"prompt_lens": "x"}, "--prompt-lens", "x", "must be a whole number"),
        ({"prompt_lens": None}, "prompt_lens", "missing", "give prompt_lens or requests"),
        ({"objective": "speed"}, "objective", "speed", "makespan"),
        ({"objective": "sla"}, "--sla-ttft-s", "missing", "a deadline"),
        ({"world_size": 0}, "world_size", "0", "greater than 0"),
        ({"cost_model": {}}, "cost_model: schema", "missing", "isochunk.cost-model/1"),
        ({"model": "llama-3-8b"}, "--cost-model", "cost_model", "stands instead of a model"),
        ({"colour": "red"}, "colour", "red", "not permitted"),
        ({"requests": [{"input_length": "many"}], "prompt_lens": None}, "requests[0].input_length", "many", "integer"),
        ({"requests": [{"input_length": -1}], "prompt_lens": None}, "requests[0].input_length", "-1", "at least 0"),
    ],
)
def test_what_is_refused_names_field_value_and_what_is_allowed(
    served: Served, change: dict[str, Any], field: str, value: str, allowed: str
) -> None:
    refused = served.client.post("/api/v1/plans", json=BATCH | change)
    assert refused.status_code == 422, refused.text
    problem = refused.json()
    assert (problem["field"], problem["value"]) == (field, value)
    assert allowed in problem["allowed"]
    assert "/tmp" not in refused.text


def test_lists_come_in_pages_that_hold_everything_once(served: Served) -> None:
    ids = [save_plan_row(served.service.database, {"number": number}) for number in range(7)]
    found: list[int] = []
    cursor = None
    while True:
        page = served.client.get("/api/v1/plans", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        found += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
        assert len(page["items"]) == 3
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    assert set(ids) <= set(found)
    points = served.client.get("/api/v1/measurements?limit=2&op=matmul&hardware=1").json()
    assert len(points["items"]) == 2
    assert {item["measurement"]["op"] for item in points["items"]} == {"matmul"}


def test_an_answer_that_has_not_changed_is_not_sent_again(served: Served) -> None:
    first = served.client.get("/api/v1/hardware")
    again = served.client.get("/api/v1/hardware", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = served.client.get("/api/v1/hardware", headers={"if-none-match": '"x"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path", ["plans/99999", "runs/99999", "runs/99999/rounds", "hardware/99999", "jobs/" + "f" * 32]
)
def test_what_is_not_there_is_404(served: Served, path: str) -> None:
    missing = served.client.get(f"/api/v1/{path}")
    assert (missing.status_code, missing.json()["status"]) == (404, 404)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("limits", "allowed"),
    [({"cpu_s": 0.05}, "within 0.05 s"), ({"memory_bytes": 180 << 20}, "180 MiB of memory")],
    ids=["time", "memory"],
)
def test_a_plan_that_takes_too_much_is_given_up(limits: dict[str, Any], allowed: str) -> None:
    import asyncio

    lengths = ",".join(["1000000"] * 16)
    request = PlanRequest(
        options={"pp_size": 4, "prompt_lens": lengths, "chunk_multiple": 16, "compare": True},
        cost_model=COST_MODEL,
        keep=False,
    )
    planning = Planning(PlanningLimits(processes=1, **limits))
    try:
        with pytest.raises(RefusedError) as refused:
            asyncio.run(planning.make(request))
    finally:
        planning.close()
    assert refused.value.status == 422
    assert allowed in refused.value.error.allowed


@pytest.mark.timeout(120)
def test_a_plan_that_nobody_waits_for_is_not_begun() -> None:
    import asyncio

    request = PlanRequest(options={"pp_size": 2, "prompt_lens": "9000"}, cost_model=COST_MODEL, keep=False)
    planning = Planning(PlanningLimits(processes=1))

    async def gone() -> bool:
        return True

    async def both() -> list[Any]:
        calls = [planning.make(request), planning.make(request, gone), planning.make(request)]
        return await asyncio.gather(*calls, return_exceptions=True)

    try:
        first, left, last = asyncio.run(both())
    finally:
        planning.close()
    assert isinstance(left, RefusedError)
    assert left.status == 503
    assert first.report["plan"]["rounds"] == last.report["plan"]["rounds"]
    assert planning.num_asked == 0

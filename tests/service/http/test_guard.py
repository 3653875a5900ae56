"""Who gets in, who does not, and what strangers may send."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from click.testing import CliRunner
from fastapi.routing import APIRoute

from db.errors import UserError
from service.cli.main import cli
from service.http.door.access import COOKIE, Scope, access_of
from service.http.door.guard import HEADERS
from service.http.problems import MEDIA_TYPE
from tests.service.http.conftest import LIMITS, Served

OPEN_TO_ALL = {"/", "/static/{name}", "/healthz", "/readyz"}
BELOW = {Scope.READ: [], Scope.PLAN: [Scope.READ, Scope.RUN], Scope.RUN: [Scope.READ, Scope.PLAN]}


def routes(served: Served) -> list[APIRoute]:
    found = [route for route in served.app.routes if isinstance(route, APIRoute)]
    assert len(found) == len(served.app.routes) > 15
    return found


def path_of(route: APIRoute) -> str:
    """A path of the route that its types accept."""
    path = route.path.replace("{name}", "app.js").replace("{job_id}", "0" * 32).replace("{engine}", "sglang")
    return re.sub(r"\{(plan|run|hardware)_id\}", "1", path)


def test_every_route_refuses_without_with_a_wrong_and_with_too_narrow_a_token(served: Served) -> None:
    for route in routes(served):
        said, scope = access_of(route.endpoint)
        assert said, f"{route.path} does not say who may call it"
        for method in route.methods:
            call, path = served.nobody.request, path_of(route)
            assert "{" not in path
            if scope is None:
                assert route.path in OPEN_TO_ALL
                assert call(method, path).status_code == 200
                continue
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic x"}, {"cookie": f"{COOKIE}=x"}):
                refused = call(method, path, headers=headers)
                assert refused.status_code == 401, (method, path, headers)
                assert refused.headers["content-type"] == MEDIA_TYPE
            narrow = call(method, path, headers=served.with_scopes(*BELOW[scope]))
            assert narrow.status_code == 403, (method, path)
            assert scope in narrow.json()["allowed"]


def test_a_route_that_says_nothing_is_open_to_nobody(served: Served) -> None:
    route = APIRoute("/api/v1/forgotten", lambda: {"secret": 1})
    served.app.router.routes.append(route)
    try:
        assert served.nobody.get("/api/v1/forgotten").status_code == 401
        assert served.client.get("/api/v1/forgotten").status_code == 403
    finally:
        served.app.router.routes.remove(route)


def test_paths_without_a_route_are_told_to_token_holders_alone(served: Served) -> None:
    for path in ("/api/v1/none", "/../etc/passwd", "/%2e%2e/etc/passwd", "/app.js", "/docs"):
        assert served.nobody.get(path).status_code == 401
        assert served.client.get(path).status_code == 404
    assert served.client.delete("/api/v1/plans").status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "testserver.evil:80", "[::2]"])
def test_names_that_are_not_ours_are_refused(served: Served, host: str) -> None:
    for path in ("/", "/api/v1/hardware"):
        refused = served.client.get(path, headers={"host": host})
        assert refused.status_code == 421
        assert refused.json()["field"] == "Host"
    assert served.client.get("/", headers={"host": "localhost:1234"}).status_code == 200


def test_every_answer_carries_the_headers_that_browsers_heed(served: Served) -> None:
    for path in ("/", "/api/v1/hardware", "/api/v1/none", "/healthz"):
        for client in (served.client, served.nobody):
            answer = client.get(path)
            assert HEADERS.items() <= dict(answer.headers).items()
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_a_browsers_session_reads_and_changes_only_from_the_page(served: Served) -> None:
    opened = served.client.post("/api/v1/session")
    assert opened.status_code == 200
    cookie = opened.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    pair = {"cookie": cookie.split(";")[0]}
    served.client.cookies.clear()
    assert served.nobody.get("/api/v1/hardware", headers=pair).status_code == 200
    body = {"cost_model": {}, "prompt_lens": "1"}
    for more in (
        {},
        {"x-isochunk": "1"},
        {"origin": "http://testserver"},
        {"origin": "http://evil.example", "x-isochunk": "1"},
        {"origin": "null", "x-isochunk": "1"},
    ):
        refused = served.nobody.post("/api/v1/plans", json=body, headers=pair | more)
        assert (refused.status_code, refused.json()["field"]) == (403, "Origin"), more
    ours = pair | {"origin": "http://testserver", "x-isochunk": "1"}
    assert served.nobody.post("/api/v1/plans", json=body, headers=ours).status_code == 422  # the model is refused
    assert served.nobody.delete("/api/v1/session", headers=ours).status_code == 204
    assert served.nobody.get("/api/v1/hardware", headers=pair).status_code == 401


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b'{"prompt_lens": NaN}', 400),
        (b'{"prompt_lens": 1e999}', 400),
        (b'{"prompt_lens": "\\ud800"}', 400),
        (b'{"prompt_lens": "1", "prompt_lens": "2"}', 400),
        (b"\xff\xfe", 400),
        (b"9" * 5000, 400),
        (b'{"prompt_lens": "' + b"1," * 60_000 + b'1"}', 422),
        (b"x" * (LIMITS.body_bytes + 1), 413),
    ],
    ids=["brackets", "nesting", "nan", "infinity", "surrogate", "twice", "bytes", "digits", "text", "huge"],
)
def test_bodies_that_nobody_can_use_are_refused(served: Served, content: bytes, status: int) -> None:
    for path in ("/api/v1/plans", "/api/v1/jobs"):
        refused = served.client.post(path, content=content, headers={"content-type": "application/json"})
        assert refused.status_code == status
        assert refused.headers["content-type"] == MEDIA_TYPE


def test_a_body_of_another_kind_is_refused(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        refused = served.client.post("/api/v1/plans", content=b"{}", headers={"content-type": kind})
        assert refused.status_code == 415


async def answer_of(served: Served, messages: list[dict[str, Any]], headers: dict[str, str]) -> int:
    """Status of the answer to a body that comes in these parts and then no further."""
    import asyncio

    left, sent = list(messages), []

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("asked after the limit")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/api/v1/plans", "raw_path": b"/api/v1/plans", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "client": ("127.0.0.1", 1),
        "scheme": "http", "server": ("testserver", 80), "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    await served.app(scope, receive, send)
    return int(sent[0]["status"])


def test_a_slow_body_is_given_up_and_an_endless_one_is_cut(served: Served) -> None:
    import asyncio

    headers = {"host": "testserver", "content-type": "application/json"} | dict(served.client.headers)
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert asyncio.run(answer_of(served, [part], headers)) == 408
    endless = [{"type": "http.request", "body": b" " * 65536, "more_body": True}] * 20
    assert asyncio.run(answer_of(served, endless, headers)) == 413


def test_a_caller_who_asks_too_often_is_told_to_wait(served: Served) -> None:
    from dataclasses import replace

    from service.http.door.guard import _Rate

    rate = _Rate(replace(LIMITS, requests_per_s=1e-9, burst=3.0))
    assert [rate.take("one") for _ in range(4)] == [True, True, True, False]
    assert rate.take("another")


EVIL = [
    "../../etc/passwd", "/etc/passwd", "1; DROP TABLE plans", "' OR 1=1 --", "<script>alert(1)</script>", "{{7*7}}",
    "$(id)", "%00", "a" * 5000, "../models/tiny", "tiny/../tiny", "--help", "-o/tmp/x",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_texts_of_attackers_name_nothing(served: Served, text: str) -> None:
    before = served.client.get("/api/v1/hardware").json()
    calls = [
        served.client.post("/api/v1/plans", json={"model": text, "prompt_lens": "10"}),
        served.client.post("/api/v1/plans", json={"model": "llama-3.2-1b", "prompt_lens": text}),
        served.client.post("/api/v1/plans", json={"model": "llama-3.2-1b", "prompt_lens": "1", "output": text}),
        served.client.post("/api/v1/plans", json={"cost_model": text, "prompt_lens": "1"}),
        served.client.post("/api/v1/jobs", json={"kind": "profile", "model": text}),
        served.client.post("/api/v1/jobs", json={"kind": "run-plan", "plan_id": 1, "weights": text}),
        served.client.post("/api/v1/jobs", json={"kind": text, "model": "tiny"}),
        served.client.post("/api/v1/jobs", json={"kind": "profile", "model": "tiny", "hardware": text}),
        served.client.post("/api/v1/jobs", json={"kind": "profile", "model": "tiny", "options": {"output": text}}),
        served.client.get("/api/v1/plans", params={"cursor": text}),
        served.client.get("/api/v1/measurements", params={"op": text}),
        served.client.get("/api/v1/runs", params={"hardware": text}),
    ]
    for call in calls:
        if call.status_code == 200:
            assert call.json() == {"items": [], "next": None}
        else:
            assert call.status_code in (400, 404, 422), (call.request.url, call.text)
            assert call.headers["content-type"] == MEDIA_TYPE
            assert json.loads(call.text)["status"] == call.status_code
    assert served.client.get("/api/v1/hardware").json() == before


def test_a_token_is_made_kept_as_a_hash_and_revoked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.door.access.KNOWN_S", 0.0)
    url = served.service.db_url

    def called(*arguments: str) -> Any:
        done = CliRunner().invoke(
            cli, ["token", *arguments, "--db", url], standalone_mode=False, catch_exceptions=False
        )
        return done.stdout

    made = json.loads(called("new", "laptop", "--scopes", "read,plan", "--json"))
    headers = {"authorization": f"Bearer {made['token']}"}
    assert served.nobody.get("/api/v1/session", headers=headers).json() == {"scopes": ["plan", "read"]}
    assert served.nobody.post("/api/v1/jobs", json={}, headers=headers).status_code == 403
    opened = served.nobody.post("/api/v1/session", headers=headers)
    session = {"cookie": opened.headers["set-cookie"].split(";")[0]}
    served.nobody.cookies.clear()
    assert served.nobody.get("/api/v1/plans", headers=session).status_code == 200
    assert made["token"] not in called("list", "--json")
    called("revoke", str(made["id"]))
    for gone in (headers, session):
        assert served.nobody.get("/api/v1/plans", headers=gone).status_code == 401
    with pytest.raises(UserError, match="must be the id of a token that is not revoked"):
        called("revoke", str(made["id"]))
    with pytest.raises(UserError, match="--scopes: all; must be some of read, plan, run"):
        called("new", "other", "--scopes", "all")

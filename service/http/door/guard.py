"""The one middleware that every request passes: hosts, limits, who may call what, and the headers of every answer.

A route that does not say who may call it is refused to everyone; a path without a route to all but token holders.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from db.errors import UserError
from db.files.json_text import parse_json
from service.http.door import access
from service.http.door.access import COOKIE, Access
from service.http.problems import RefusedError, problem

SAFE_METHODS = frozenset({"GET", "HEAD"})
PAGE_HEADER = "x-isochunk"
"""Sent by the page's own code with every request that changes something: no form and no other site can send it."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_MOST_URL_BYTES = 8 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request, and one caller, may take."""

    body_bytes: int = 16 << 20
    body_s: float = 20.0
    """Seconds within which the whole body must have come."""
    requests_per_s: float = 200.0
    burst: float = 400.0


@dataclass(slots=True)
class _Bucket:
    """Requests that a caller may still make; it fills up again with time."""

    left: float
    at: float


@dataclass(slots=True)
class _Rate:
    """A bucket for each caller; callers that have been away for long are forgotten."""

    limits: RequestLimits
    buckets: dict[str, _Bucket] = field(default_factory=dict)

    def take(self, caller: str) -> bool:
        now = time.monotonic()
        if len(self.buckets) > 10_000:
            self.buckets.clear()
        bucket = self.buckets.setdefault(caller, _Bucket(self.limits.burst, now))
        bucket.left = min(self.limits.burst, bucket.left + (now - bucket.at) * self.limits.requests_per_s)
        bucket.at = now
        if bucket.left < 1.0:
            return False
        bucket.left -= 1.0
        return True


class Guard:
    """Lets a request through to the application, or answers it.

    hosts: names that a Host header may carry, ports left out.
    routes: of the application, each with the endpoint that says who may call it.
    """

    def __init__(self, app: ASGIApp, *, access: Access, hosts: Iterable[str], routes: list[Any], limits: RequestLimits):
        self.app, self.access, self.routes, self.limits = app, access, routes, limits
        self.hosts = frozenset(hosts)
        self._rate = _Rate(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._check(scope)
            body = await self._body(scope, receive)
        except RefusedError as refused:
            await problem(refused.status, refused.error, refused.headers)(scope, receive, send_safely)
            return
        await self.app(scope, _replay(body, receive), send_safely)

    async def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = _name(headers.get("host", ""))
        if host not in self.hosts:
            raise RefusedError(421, "Host", headers.get("host", "missing"), "must be a name that this service goes by")
        if len(scope["path"]) + len(scope["query_string"]) > _MOST_URL_BYTES:
            raise RefusedError(414, "URL", scope["path"][:80], f"must be at most {_MOST_URL_BYTES} bytes")
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            raise RefusedError(400, "URL", scope["path"], "must hold no zero byte")
        scopes, by_cookie, caller = await self._caller(headers, scope)
        if not self._rate.take(caller):
            raise RefusedError(
                429,
                "requests",
                "too many",
                f"at most {self.limits.requests_per_s:g} a second",
                headers={"retry-after": "1"},
            )
        said, needed = self._needed(scope)
        if said and needed is None:
            return
        if scopes is None:
            raise RefusedError(
                401,
                "Authorization",
                "missing or unknown",
                "must be Bearer and a token",
                headers={"www-authenticate": "Bearer"},
            )
        if by_cookie and scope["method"] not in SAFE_METHODS:
            self._check_origin(headers)
        if said is False:
            raise RefusedError(403, "route", scope["path"], "is open to nobody")
        if needed is not None and needed not in scopes:
            raise RefusedError(403, "token", "this one", f"must have the scope {needed}")
        scope.setdefault("state", {})["scopes"] = scopes

    async def _caller(self, headers: Headers, scope: Scope) -> tuple[frozenset[access.Scope] | None, bool, str]:
        """What the caller may do, whether a cookie says so, and a name to count its requests by."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        address = (scope.get("client") or ("", 0))[0]
        by_cookie = not kind
        if by_cookie:
            session = session_of(headers)
            hashed = self.access.token_of_session(session) if session else None
        else:
            hashed = access.hash_of(token.strip()) if kind.lower() == "bearer" else None
        if hashed is None:
            return None, by_cookie, address
        known, scopes = self.access.remembered(hashed)
        if not known:  # a look into the database
            scopes = await asyncio.to_thread(self.access.looked_up, hashed)
        return scopes, by_cookie, hashed if scopes else address

    def _needed(self, scope: Scope) -> tuple[bool | None, access.Scope | None]:
        """Whether the route says who may call it, and the scope it asks for; (None, None) where there is no route."""
        for route in self.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return access.access_of(route.endpoint)
        return None, None

    def _check_origin(self, headers: Headers) -> None:
        """Raise unless the page itself sent this: a browser sends cookies for other sites' requests too."""
        origin = headers.get("origin", "")
        if origin.partition("://")[2] != headers.get("host", "") or headers.get(PAGE_HEADER) != "1":
            raise RefusedError(403, "Origin", origin or "missing", "must be this service's own page")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within the limits of size and time; JSON is checked for what nobody can use."""
        headers, most = Headers(scope=scope), self.limits.body_bytes
        too_large = RefusedError(
            413, "body", headers.get("content-length", "too long"), f"must be at most {most} bytes"
        )
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or len(declared) > 15 or int(declared) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise RefusedError(408, "body", "slow", f"must come within {self.limits.body_s:g} s") from None
        body = b"".join(parts)
        if body:
            if "json" not in headers.get("content-type", "application/json"):
                raise RefusedError(415, "Content-Type", headers["content-type"], "must be application/json")
            try:
                await asyncio.to_thread(parse_json, body, "body", f"{size} bytes")
            except UserError as error:
                raise RefusedError(400, error.field, error.value, error.allowed) from None
        return body


def session_of(headers: Headers) -> str | None:
    """The session that a request's cookie names."""
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def _name(host: str) -> str:
    """A Host header's name without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.partition(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands the body on once, then waits for the caller to go."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again

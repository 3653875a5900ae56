"""Calls a remote service with Python's standard library; it needs only a URL and a token.

client = Client.at("http://127.0.0.1:8321/#token=...")
made = client.post("plans", {"model": "llama-3-8b", "world_size": 2, "prompt_lens": "32768"})
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from db.errors import UserError
from db.files.json_text import parse_json

TOKEN_VARIABLE = "ISOCHUNK_TOKEN"
_ALLOWED = "must be http://HOST:PORT or https://HOST, with #token=TOKEN or ISOCHUNK_TOKEN set"
_TIMEOUT_S = 60.0
_MOST_BYTES = 256 << 20
_POLL_S = 1.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token elsewhere."""

    def redirect_request(self, *_given: Any, **_named: Any) -> None:
        """Follow none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A service and the token that opens it."""

    url: str
    token: str = field(repr=False)

    @classmethod
    def at(cls, address: str) -> Client:
        """The service at an address, as `isochunk serve` prints it. Raises UserError for one that is none."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--server", address.partition("#")[0], _ALLOWED)
        token = parts.fragment.removeprefix("token=") or os.environ.get(TOKEN_VARIABLE, "")
        if not token.isascii() or not token.isprintable() or not token:
            raise UserError(TOKEN_VARIABLE, "missing", _ALLOWED)
        return cls(url=f"{parts.scheme}://{parts.netloc}", token=token)

    def get(self, path: str, **query: object) -> Any:
        """What a path of `/api/v1` holds. Raises UserError for what the service refuses."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", f"{path}?{urlencode(given)}" if given else path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a body that is sent to a path of `/api/v1`. Raises UserError for what the service refuses."""
        return self._call("POST", path, json.dumps(body or {}).encode())

    def items(self, path: str, limit: int, **query: object) -> list[Any]:
        """The first `limit` items of a list that comes in pages."""
        found: list[Any] = []
        cursor = None
        while len(found) < limit:
            page = self.get(path, limit=min(200, limit - len(found)), cursor=cursor, **query)
            if isinstance(page, list):
                return page[:limit]
            found += page["items"]
            cursor = page["next"]
            if cursor is None:
                break
        return found

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job says, line by line, until it is over; the connection may break meanwhile."""
        seen = 0
        while True:
            for line in self._open("GET", f"jobs/{job_id}/events?after={seen}", None):
                if line.startswith(b"id: "):
                    seen = int(line[4:])
                elif line.startswith(b"data: ") and b'"lines"' in line:
                    yield from json.loads(line[6:])["lines"]
            if self.get(f"jobs/{job_id}")["status"] not in ("queued", "running"):
                return
            time.sleep(_POLL_S)

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        with self._open(method, path, body) as answer:
            return parse_json(answer.read(_MOST_BYTES), "--server", self.url)

    def _open(self, method: str, path: str, body: bytes | None) -> Any:
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", body, headers, method=method)
        try:
            return urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise UserError("--server", self.url, f"cannot be reached ({reason})") from None

    def _refusal(self, error: urllib.error.HTTPError) -> UserError:
        try:
            problem = json.loads(error.read(1 << 16))
            return UserError(problem["field"], problem["value"], problem["allowed"])
        except (ValueError, KeyError, TypeError):
            return UserError("--server", self.url, f"answered with status {error.code}, which is none of isochunk's")

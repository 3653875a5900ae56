"""Errors as RFC 9457 problem details, with the same field, value and allowed as on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from db.errors import UserError, cut
from db.files.json_text import key_path

MEDIA_TYPE = "application/problem+json"


class ProblemDetails(BaseModel):
    """What went wrong, as RFC 9457 tells it; `field`, `value` and `allowed` where a value was at fault."""

    type: str = "about:blank"
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="One line for people.")
    field: str | None = None
    value: str | None = None
    allowed: str | None = None


RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ProblemDetails, "description": HTTPStatus(code).phrase, "content": {MEDIA_TYPE: {}}}
    for code in (400, 401, 403, 404, 408, 413, 422, 429, 503)
}


class RefusedError(Exception):
    """A request that cannot be served, with the status that says so."""

    def __init__(
        self, status: int, field: str, value: object, allowed: str, *, headers: Mapping[str, str] | None = None
    ):
        self.status = status
        self.error = UserError(field, value, allowed)
        self.headers = dict(headers or {})
        super().__init__(str(self.error))


def missing(field: str, value: object, allowed: str = "must be the id of something that is kept") -> RefusedError:
    """What answers for an id that nothing has."""
    return RefusedError(404, field, value, allowed)


def problem(status: int, error: UserError | str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed."""
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": str(error),
    }
    if isinstance(error, UserError):
        content |= {"field": cut(error.field, 160), "value": cut(error.value), "allowed": cut(error.allowed, 2000)}
    return Response(json.dumps(content), status, headers, MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Answer every error with a problem."""
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


def _user_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    # The database at fault is the service's trouble; everything else is the caller's input.
    return problem(503 if error.field == "database" else 422, error)


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return problem(error.status, error.error, error.headers)


def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, cut(error.detail, 500), error.headers)


def _invalid(_request: Request, error: Exception) -> Response:
    """The first thing that a request's types refuse."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = key_path(part for part in first["loc"] if part not in ("body", "query", "path"))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return problem(422, UserError(f"{where}.{cause.field}".strip("."), cause.value, cause.allowed))
    value = "missing" if first["type"] == "missing" else first.get("input")
    return problem(422, UserError(where or "body", value, first["msg"]))

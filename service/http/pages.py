"""Pagination of lists, and ETags that say whether an answer has changed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from service.http.problems import RefusedError

T = TypeVar("T")
Limit = Annotated[int, Query(ge=1, le=200, description="At most so many.")]
Cursor = Annotated[str | None, Query(max_length=64, description="`next` of the page before this one.")]
MOST_ID = 2**31 - 1
"""Of what a database numbers."""
_PREFIX = "before:"


class Page(BaseModel, Generic[T]):
    """Some of a list, the newest first."""

    items: list[T]
    next: str | None = Field(description="The cursor of the page after this one; null at the end.")


def page_of(rows: Sequence[Any], limit: int, shown: Callable[[Any], T]) -> Page[T]:
    """A page of `limit` rows, made of one row more than that where there are more."""
    kept = rows[:limit]
    return Page(items=[shown(row) for row in kept], next=cursor_of(kept[-1].id) if len(rows) > limit else None)


def cursor_of(row_id: int) -> str:
    """The cursor of the page after the row of an id."""
    return base64.urlsafe_b64encode(f"{_PREFIX}{row_id}".encode()).decode().rstrip("=")


def before_of(text: str | None) -> int | None:
    """The id that a cursor's page comes before; None for the first page."""
    if text is None:
        return None
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
        number = int(decoded.removeprefix(_PREFIX))
    except ValueError:
        number = -1
    if not 0 <= number <= MOST_ID or cursor_of(number) != text:
        raise RefusedError(422, "cursor", text, "must be `next` of a page")
    return number


class TaggedRoute(APIRoute):
    """A route whose answers to GET carry an ETag; who has that one already gets 304 and no body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler with the tag around it."""
        handle = super().get_route_handler()

        async def tagged(request: Request) -> Response:
            response = await handle(request)
            body = getattr(response, "body", None)
            if request.method != "GET" or response.status_code != 200 or not body:
                return response
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            headers = {"etag": tag, "cache-control": "private, no-cache"}
            if tag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            response.headers.update(headers)
            return response

        return tagged

"""The page and its files, and the session that it opens."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.http.door.access import COOKIE, SESSION_S, Scope, open_to, open_to_all
from service.http.door.guard import session_of
from service.http.problems import RESPONSES, RefusedError, missing
from service.http.routes.router import PREFIX
from service.http.state import Shared

router = APIRouter(responses=RESPONSES, tags=["site"])
_FILES = files("service.http").joinpath("static")
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_STATIC = frozenset(path.name for path in _FILES.iterdir())
"""The only names that are ever looked up."""


class Session(BaseModel):
    """What the caller may do."""

    scopes: list[Scope]


@router.get("/", include_in_schema=False)
@open_to_all
def page() -> Response:
    """The page; it holds nothing of what is kept."""
    return _file("index.html")


@router.get("/static/{name}", include_in_schema=False)
@open_to_all
def static(name: str) -> Response:
    """A file of the page's own."""
    if name not in _STATIC:
        raise missing("file", name, "must be a file of the page")
    return _file(name)


@router.post(f"{PREFIX}/session")
@open_to(Scope.READ)
def begin_session(request: Request, service: Shared, response: Response) -> Session:
    """A session for a browser: a cookie that its scripts cannot read, for the token that this request carries."""
    scopes = request.state.scopes
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if not kind:
        raise RefusedError(401, "Authorization", "missing", "must be Bearer and a token: a session opens no other")
    session = service.access.open_session(token.strip())
    response.set_cookie(
        COOKIE, session, max_age=int(SESSION_S), httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return Session(scopes=sorted(scopes))


@router.get(f"{PREFIX}/session")
@open_to(Scope.READ)
def read_session(request: Request) -> Session:
    """What the caller may do."""
    return Session(scopes=sorted(request.state.scopes))


@router.delete(f"{PREFIX}/session", status_code=204)
@open_to(Scope.READ)
def end_session(request: Request, service: Shared, response: Response) -> None:
    """End the browser's session."""
    session = session_of(request.headers)
    if session:
        service.access.end_session(session)
    response.delete_cookie(COOKIE)


def _file(name: str) -> Response:
    data = _FILES.joinpath(name).read_bytes()
    return Response(data, media_type=_KINDS[name[name.rindex(".") :]], headers={"cache-control": "no-cache"})

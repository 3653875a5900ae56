"""Routers whose routes answer with problems, carry ETags, and stand flat in the application."""

from __future__ import annotations

from fastapi import APIRouter

from service.http.pages import TaggedRoute
from service.http.problems import RESPONSES

PREFIX = "/api/v1"


def api_router(tag: str) -> APIRouter:
    """A router of `/api/v1`; `tag` groups its routes on the OpenAPI page."""
    return APIRouter(prefix=PREFIX, route_class=TaggedRoute, responses=RESPONSES, tags=[tag])

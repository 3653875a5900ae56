"""Health, readiness and metrics for operators."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text
from starlette.responses import Response

from service.http.door.access import Scope, open_to, open_to_all
from service.http.operating.metrics import CONTENT_TYPE
from service.http.problems import RESPONSES
from service.http.state import Shared

router = APIRouter(responses=RESPONSES, tags=["operating"])


class Health(BaseModel):
    """Whether the service is there."""

    status: str


@router.get("/healthz")
@open_to_all
def health() -> Health:
    """Whether the process answers."""
    return Health(status="ok")


@router.get("/readyz")
@open_to_all
def ready(service: Shared) -> Health:
    """Whether the database and the queue answer too."""
    with service.database.reading() as session:
        session.execute(text("SELECT 1"))
    service.jobs.page(limit=1)
    return Health(status="ok")


@router.get("/metrics", response_class=Response)
@open_to(Scope.READ)
def metrics(service: Shared) -> Response:
    """Figures in Prometheus's text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)

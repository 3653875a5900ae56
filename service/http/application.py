"""The application: routes, error handlers and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute

from service.http.door.access import Scope, open_to
from service.http.door.guard import Guard, RequestLimits
from service.http.operating.observed import Observed
from service.http.problems import add_handlers
from service.http.routes import kept, operating, plans, site
from service.http.routes.jobs import Options, job_router
from service.http.routes.router import api_router
from service.http.state import Service

DESCRIPTION = """Finds the fastest chunked-pipeline plan for long-context prefill on measured hardware.

Every call needs `Authorization: Bearer TOKEN`. Lists come in pages: pass `next` as `cursor`. Answers to GET carry an
ETag. Errors are RFC 9457 problems with the field, its value and what is allowed.
"""


def make_application(
    service: Service, job_options: Options, *, hosts: Sequence[str], limits: RequestLimits | None = None
) -> FastAPI:
    """The application of a service.

    hosts: names that a Host header may carry. limits: of a request.
    """

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        service.planning.warm_up()
        yield
        service.planning.close()
        service.jobs.close()
        service.database.close()

    app = FastAPI(
        title="isochunk",
        version="1",
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=life,
    )
    app.state.service = service
    routes: list[BaseRoute] = app.router.routes
    for router in (site.router, operating.router, kept.router, plans.router, job_router(job_options), _described(app)):
        routes.extend(router.routes)
    add_handlers(app)
    app.add_middleware(Guard, access=service.access, hosts=hosts, routes=routes, limits=limits or RequestLimits())
    app.add_middleware(Observed, metrics=service.metrics, log=service.log)
    return app


def _described(app: FastAPI) -> APIRouter:
    router = api_router("site")

    @router.get("/openapi.json", include_in_schema=False)
    @open_to(Scope.READ)
    def openapi() -> dict[str, object]:
        """The API as OpenAPI 3.1 tells it."""
        return app.openapi()

    return router

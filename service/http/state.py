"""What the routes of one service share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from db.rows.hardware import HardwareList
from db.rows.workers import list_workers
from db.store.engine import Database
from service.http.door.access import Access
from service.http.operating.metrics import Metrics
from service.http.planning.processes import Planning
from service.jobs.log import Log
from service.jobs.queue import JobQueue


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service: its database, its tokens, and the processes that plan."""

    database: Database
    access: Access
    planning: Planning
    jobs: JobQueue
    model_folders: tuple[Path, ...]
    log: Log = field(default_factory=Log)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Figures of this service."""
        return Metrics(
            jobs=self.jobs.counts,
            workers=lambda: len(list_workers(self.database, alive=True)),
            plans=lambda: self.planning.num_asked,
        )

    @functools.cached_property
    def hardware(self) -> HardwareList:
        """All hardware that something is kept of."""
        return HardwareList(self.database)

    @property
    def db_url(self) -> str:
        """The database's URL, with its password: for processes of the service's own."""
        return self.database.url.render_as_string(hide_password=False)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(_service)]

"""Where the queue is stored: in its own file beside a SQLite database, in its own schema on PostgreSQL.

DBOS keeps it. What it keeps of ours is JSON: nothing that is read from the database is ever executed.
"""

from __future__ import annotations

from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer
from sqlalchemy import URL

from db.errors import UserError
from db.store.location import shown, sqlite_path

APP = "isochunk"
VERSION = "jobs-1"
"""Of a job's shape, not of the code: a newer isochunk goes on with what an older one queued."""
WORKFLOW = "job"
LOG = "log"


def jobs_url(url: URL) -> str:
    """The URL of the queue that belongs to a database. Raises UserError for one in memory."""
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=False)
    path = sqlite_path(url)
    if path is None:
        raise UserError("database", shown(url), "must be a file or a server for jobs to be queued")
    return f"sqlite:///{path.absolute().with_name(f'{path.name}-jobs')}"


def open_client(url: URL) -> DBOSClient:
    """A client of the queue, its tables made first."""
    _quiet()
    DBOS.migrate(jobs_url(url))
    return DBOSClient(system_database_url=jobs_url(url), serializer=DBOSPortableJSONSerializer(), application_name=APP)


def worker_config(url: URL, executor: str) -> DBOSConfig:
    """The configuration of a worker's DBOS. `executor` names this one process."""
    _quiet()
    return DBOSConfig(
        name=APP,
        system_database_url=jobs_url(url),
        application_version=VERSION,
        executor_id=executor,
        serializer=DBOSPortableJSONSerializer(),
        enable_otlp=False,
        log_level="CRITICAL",
        notification_listener_polling_interval_sec=0.2,
    )


def _quiet() -> None:
    """Keep the library's own words off the log: what it tells of cancelled and lost jobs we tell ourselves."""
    import logging

    logging.getLogger("dbos").setLevel(logging.CRITICAL)

"""Runs a service: database, token, planning processes, a worker beside it, and the server."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from db.errors import UserError
from db.rows.tokens import token_scopes
from db.store.engine import open_database
from service.http.application import make_application
from service.http.door.access import Access
from service.http.planning.processes import Planning, PlanningLimits
from service.http.routes.jobs import Options
from service.http.serve_options import ServeOptions
from service.http.state import Service
from service.jobs.log import Log
from service.jobs.process import end
from service.jobs.queue import JobQueue

_MOST_CONNECTIONS = 500
_GRACE_S = 3
_END_WITHIN_S = 15.0
"""From the signal to the end: requests have their grace, and the worker its own."""
_AGAIN_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a service listens, and the token that opens it, if one was made."""

    url: str
    token: str | None

    @property
    def first_visit(self) -> str:
        """What a browser opens: the part after # is never sent, and so stands in no log."""
        return f"{self.url}/#token={self.token}" if self.token else self.url


class _Server(uvicorn.Server):
    """uvicorn's server, which ends in time whatever a thread or a planning process still does."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, gracefully, and see to it that this has an end."""
        backstop = threading.Timer(_END_WITHIN_S, os._exit, [0])
        backstop.daemon = True
        backstop.start()
        super().handle_exit(sig, frame)


def serve(options: ServeOptions, job_options: Options) -> None:
    """Serve until the process is asked to end. The address with its token is printed once, on standard error."""
    listener = listen(options.host, options.port)
    database = open_database(options.db_url)
    access = Access(kept=functools.partial(token_scopes, database))
    name = f"[{options.host}]" if ":" in options.host else options.host
    log = Log(as_json=options.log == "json")
    address = Address(
        url=f"http://{name}:{listener.getsockname()[1]}", token=access.make_token() if options.token else None
    )
    service = Service(
        database=database,
        access=access,
        planning=Planning(PlanningLimits()),
        jobs=JobQueue(database.url),
        model_folders=options.model_folders,
        log=log,
    )
    app = make_application(service, job_options, hosts=options.hosts)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_S,
        h11_max_incomplete_event_size=32 << 10,
        lifespan="on",
    )
    lines = f"isochunk serves {database.location}\nOpen {address.first_visit}"
    log.say("serves", lines, database=database.location, url=address.url, first_visit=address.first_visit)
    with _worker(options) if options.worker else _nothing():
        _Server(config).run(sockets=[listener])
    log.say("ends", None, url=address.url)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that who calls before the server runs waits. Raises UserError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_MOST_CONNECTIONS)
    except OSError as error:
        raise UserError("--port", port, f"must be free on {host} ({error.strerror})") from None
    return listener


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _worker(options: ServeOptions) -> Iterator[None]:
    """A worker on this machine, started again when it ends, and ended with the service."""
    stop = threading.Event()
    keeper = threading.Thread(target=_keep, args=(options, stop), name="worker", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join(10.0)


def _keep(options: ServeOptions, stop: threading.Event) -> None:
    words = [sys.executable, "-m", "service.jobs.child", str(os.getpid()), "worker", f"--log={options.log}"]
    if options.models:
        words += ["--models", options.models]
    if options.machine:
        words += ["--machine", options.machine]
    environment = os.environ | ({"ISOCHUNK_DB": options.db_url} if options.db_url else {})
    while not stop.is_set():
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not stop.wait(0.2):
            time.sleep(0)
        if stop.is_set():
            end(process)
        elif process.returncode == 2:  # its error was printed, and would be again: another worker is here
            return
        stop.wait(_AGAIN_AFTER_S)

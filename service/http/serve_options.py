"""Options of `isochunk serve`: each with its help and what is allowed, declared once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from db.errors import UserError
from service.jobs.worker_options import LOGS, folders_of
from service.use_cases.options import check_options, db_url, option

DEFAULT_PORT = 8321
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of `isochunk serve`. Raises UserError for values that are not allowed, alone or together."""

    host: str = option("127.0.0.1", "Address to listen on; others than this machine's own need --allow-host.")
    port: int = option(DEFAULT_PORT, "Port to listen on; 0 takes a free one.")
    allow_host: str | None = option(None, "Names that callers know this service by.", metavar="NAME,...")
    models: str | None = option(
        None, "Folders with models that may be named, each a folder with a config.json.", metavar=f"DIR{os.pathsep}..."
    )
    worker: bool = option(True, "Run jobs on this machine too. [default: worker]")
    machine: str | None = option(None, "Name of this machine, for its worker. [default: its host name]")
    token: bool = option(True, "Make a token and print it, once. [default: token]")
    log: str = option("text", "What is said on standard error; json has a line for each request.", choices=LOGS)
    db_url: str | None = db_url()

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.port <= 65535:
            raise UserError("--port", self.port, "must be from 0 to 65535")
        try:
            address = ipaddress.ip_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError:
            raise UserError("--host", self.host, "must be an address, such as 127.0.0.1 or 0.0.0.0") from None
        if not address.is_loopback and self.allow_host is None:
            raise UserError("--host", self.host, "needs --allow-host with the names that callers use")
        for folder in self.model_folders:
            if not folder.is_dir():
                raise UserError("--models", folder, "must be an existing folder")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that a Host header may carry."""
        more = (name.strip().lower() for name in (self.allow_host or "").split(","))
        return (*LOOPBACK_NAMES, *(name for name in more if name))

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Folders whose models may be named."""
        return folders_of(self.models)

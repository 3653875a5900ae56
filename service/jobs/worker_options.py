"""Options of `isochunk worker`: each with its help and what is allowed, declared once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from db.errors import UserError
from service.use_cases.options import check_options, db_url, option

LOGS = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Options of `isochunk worker`. Raises UserError for values that are not allowed."""

    machine: str | None = option(None, "Name of this machine: one worker each. [default: its host name]")
    hardware: str | None = option(None, "Name of its devices. [default: what they call themselves]")
    device_type: str | None = option(
        None, "[default: cuda where there is one]", flags=("--device",), choices=("cpu", "cuda")
    )
    models: str | None = option(
        None, "Folders with models that jobs may name, each a folder with a config.json.", metavar=f"DIR{os.pathsep}..."
    )
    log: str = option("text", "What is said on standard error.", choices=LOGS)
    db_url: str | None = db_url()

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("machine", "hardware"):
            value = getattr(self, name)
            if value is not None and not (0 < len(value) <= 100 and value.isprintable() and "/" not in value):
                raise UserError(f"--{name}", value, "must be printable, at most 100 characters, without a slash")
        for folder in folders_of(self.models):
            if not folder.is_dir():
                raise UserError("--models", folder, "must be an existing folder")


def folders_of(text: str | None) -> tuple[Path, ...]:
    """The folders that an option names."""
    return tuple(Path(part) for part in (text or "").split(os.pathsep) if part)

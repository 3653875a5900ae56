"""Where the database is: the URL a user gives, the default file, and what is checked before it is opened."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from db.errors import UserError

URL_VARIABLE = "ISOCHUNK_DB"
_ALLOWED = "must be a URL such as sqlite:////home/me/profile.db or postgresql://user@host/name"
_QUERY_PASSWORD = re.compile(r"(password=)[^&]*", re.IGNORECASE)
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


def default_url() -> str:
    """`ISOCHUNK_DB` if it is set, else a SQLite file in the user's data folder."""
    return os.environ.get(URL_VARIABLE) or f"sqlite:///{default_path()}"


def default_path() -> Path:
    """The SQLite file that is used when no URL is given."""
    from platformdirs import user_data_path

    return user_data_path("isochunk", appauthor=False) / "isochunk.db"


def parse_url(text: str) -> URL:
    """Read a SQLAlchemy URL of SQLite or PostgreSQL (through psycopg 3)."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # a ValueError: a port that is not a number
        raise UserError("database", _masked(text), _ALLOWED) from None
    backend, _, driver = url.drivername.partition("+")
    if backend not in _DRIVERS or driver not in {"", "psycopg", "pysqlite"}:
        raise UserError("database", shown(url), _ALLOWED)
    return url if driver else url.set(drivername=_DRIVERS[backend])


def shown(url: URL) -> str:
    """The URL as it may be printed: without the password."""
    return _QUERY_PASSWORD.sub(r"\1***", url.render_as_string(hide_password=True))


def _masked(text: str) -> str:
    """A text that is no URL, without what may be a password in it."""
    login, at, rest = text.rpartition("@")
    if at:
        text = f"{login.partition('//')[0]}//***@{rest}" if "//" in login else f"***@{rest}"
    else:  # user:password without its host reads as host:port
        text = re.sub(r"(//[^/:]+:)[^/]*", r"\1***", text)
    return _QUERY_PASSWORD.sub(r"\1***", text)


def sqlite_path(url: URL) -> Path | None:
    """The file behind a SQLite URL; None for a database in memory, a `file:` URI or a server."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return None if url.database.startswith("file:") else Path(url.database)


def check_file(path: Path, *, read_only: bool) -> None:
    """Raise UserError for a SQLite file that cannot serve, before anything is created or measured."""
    folder = path.parent
    if path == default_path() and not read_only:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("database folder", folder, f"cannot be created ({error.strerror})") from None
    if not folder.is_dir():
        raise UserError("database folder", folder, "must be an existing folder")
    if path.exists() and not path.is_file():
        raise UserError("database", path, "must be a file")
    if read_only:
        if not path.exists():
            raise UserError("database", path, "nothing there yet; `isochunk profile MODEL` creates and fills it")
        if not os.access(path, os.R_OK):
            raise UserError("database", path, "must be readable")
    elif path.exists() and not os.access(path, os.W_OK):
        raise UserError("database", path, "read-only; must be writable")
    elif not os.access(folder, os.W_OK):  # SQLite writes its journal beside the file
        raise UserError("database folder", folder, "read-only; must be writable")


def read_only_url(url: URL, path: Path) -> URL:
    """The same SQLite file through a URI that cannot write to it."""
    uri = url.set(database=f"file:{quote(str(path.resolve()))}").update_query_dict({"mode": "ro", "uri": "true"})
    has_journal = path.with_name(f"{path.name}-wal").exists()
    if not os.access(path.parent, os.W_OK) and not has_journal:
        # A WAL file in a folder where no shared-memory file can be made is readable only as an unchanging one.
        return uri.update_query_dict({"immutable": "1"})
    return uri

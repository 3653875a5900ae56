"""Replaces files atomically, and checks beforehand whether a file can be written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from db.errors import UserError

_PROBE_BYTES = 1 << 16


def replace_file(path: Path, data: bytes) -> None:
    """Write the file beside its place and move it there: a reader sees the old one or the new one, never a part.

    Raises UserError when it cannot be written; the old file then stands.
    """
    with _beside("file", path, len(data)) as temporary:
        _write(temporary, data)
        temporary.chmod(_mode())
        os.replace(temporary, path)  # noqa: PTH105 - the word everyone knows for it


def check_writable(field: str, path: Path) -> None:
    """Raise UserError, before the work is done that a file is to keep, where `replace_file` would fail.

    A file of 64 KiB is written beside its place and removed: a full disk, a folder that is read-only and a name that
    is too long are refused by the file system itself.
    """
    with _explained(field, path, _PROBE_BYTES), suppress(FileNotFoundError):
        path.stat()  # tells of a name that is too long
    if path.is_dir():
        raise UserError(field, path, "must be a file, not a folder")
    if not path.absolute().parent.is_dir():
        raise UserError(field, path, "must be in a folder that exists")
    with _beside(field, path, _PROBE_BYTES) as temporary:
        _write(temporary, bytes(_PROBE_BYTES))


def flush_to_disk(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _beside(field: str, path: Path, size_bytes: int) -> Iterator[Path]:
    """An empty file beside `path`, gone at the end; what the file system refuses becomes a UserError."""
    temporary = None
    try:
        with _explained(field, path, size_bytes):
            handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(field: str, path: Path, size_bytes: int) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"no space left for its {max(1, size_bytes >> 10)} KiB"
        raise UserError(field, path, f"cannot be written ({reason})") from None


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _mode() -> int:
    """What a plainly opened file would get; mkstemp gives its owner alone access."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask

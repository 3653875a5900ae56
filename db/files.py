"""Replaces a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from db.errors import UserError


def replace_file(path: Path, data: bytes) -> None:
    """Write the file beside its place and move it there: a reader sees the old one or the new one, never a part.

    Raises UserError when it cannot be written; the old file then stands.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(_mode())
        os.replace(temporary, path)  # noqa: PTH105 - the word everyone knows for it
    except OSError as error:
        raise UserError("file", path, f"cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _mode() -> int:
    """What a plainly opened file would get; mkstemp gives its owner alone access."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask

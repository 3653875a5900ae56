"""A machine's cards are held by one worker at a time, and by its job's process while that lives."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from db.errors import UserError


@contextmanager
def hold_machine(machine: str) -> Iterator[int]:
    """Hold the lock of a machine's name for the length of the block -> its file descriptor.

    A child that inherits the descriptor holds it too, so that no worker begins while an old one's job is still ending.
    Raises UserError when another worker has it.
    """
    name = hashlib.sha256(machine.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"isochunk{os.getuid()}-machine-{name}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("--machine", machine, "already has a worker, or a job that is ending") from None
        os.set_inheritable(file.fileno(), True)
        yield file.fileno()

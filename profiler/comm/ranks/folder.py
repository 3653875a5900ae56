"""The folder that a launcher shares with its ranks; folders of dead launchers are removed."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PREFIX = "isochunk-"
_OWNER = "owner"


class RunFolder:
    """Names of the files in it. `task` is written by the launcher, all others by the rank in their name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def task(self) -> Path:
        """What the ranks run, pickled."""
        return self.path / "task"

    def progress(self, rank: int) -> Path:
        """What the rank is doing; see `profiler.comm.ranks.mark`."""
        return self.path / f"progress-{rank}"

    def stacks(self, rank: int) -> Path:
        """Stacks of the rank's threads, when it was asked for them."""
        return self.path / f"stacks-{rank}"

    def error(self, rank: int) -> Path:
        """The rank's failure, pickled."""
        return self.path / f"error-{rank}"

    def result(self, rank: int) -> Path:
        """What the rank's function returned, pickled."""
        return self.path / f"result-{rank}"

    def report(self, rank: int, index: int) -> Path:
        """What the rank reported on the way, pickled."""
        return self.path / f"report-{rank}-{index}"


@contextmanager
def run_folder() -> Iterator[RunFolder]:
    """A new folder, removed at the end. Its owner holds a lock on it, which the kernel frees when the owner dies."""
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    with (path / _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield RunFolder(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def sweep_folders() -> None:
    """Remove the folders of launchers of this user that are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, not ours, or swept by someone else meanwhile
            if path.stat().st_uid == os.getuid() and _is_abandoned(path / _OWNER):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(owner: Path) -> bool:
    with owner.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def write_whole(path: Path, value: Any) -> None:
    """Pickle a value into a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(pickle.dumps(value))
    part.replace(path)


def read_whole(path: Path) -> Any:
    """The value in the file; None where there is no file."""
    return pickle.loads(path.read_bytes()) if path.exists() else None

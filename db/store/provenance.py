"""The time and the code version that are stored with each row."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def now() -> datetime:
    """The present time in UTC."""
    return datetime.now(UTC)


@cache
def code_version() -> str:
    """Version of the installed distribution; in a git checkout its commit too: `0.1.0+1a2b3c4`, `-dirty` if edited."""
    try:
        release = version("isochunk")
    except PackageNotFoundError:
        release = "0"
    commit = _checkout_commit(Path(__file__).parents[2])
    return f"{release}+{commit}" if commit else release


def _checkout_commit(root: Path) -> str:
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

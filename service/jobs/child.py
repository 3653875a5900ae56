"""The process of a job: runs the command line, ends with its worker, and stores the job's result before it exits.

`python -m service.jobs.child WORKER_PID COMMAND ARGUMENTS...`, the job's id in `ISOCHUNK_JOB`, standard output a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, TextIO

from db.errors import UserError
from profiler.comm.ranks.child import die_with

INTERRUPTED = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
"""Exit codes of commands that were told to end: their jobs are not over, and others may go on with them."""
NOT_KEPT = 75
"""Exit code of a command whose end could not be written: its job has not ended (BSD's EX_TEMPFAIL)."""
_MOST_RESULT_BYTES = 8 << 20
_MOST_TOLD = 4000


class RememberedText:
    """A stream of text that remembers what was written to it last."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.told = stream, ""

    def write(self, text: str) -> int:
        """Hand on and remember."""
        count = self.stream.write(text)
        self.told = (self.told + text)[-_MOST_TOLD:]
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def last(self) -> str:
        """The last line that is not empty."""
        return next((line.strip() for line in reversed(self.told.splitlines()) if line.strip()), "")


def main(arguments: list[str]) -> int:
    """Run the command line and keep the end of its job -> the exit code."""
    sys.argv[1:] = arguments
    told = RememberedText(sys.stderr)
    sys.stderr = told
    code = 0
    try:
        # By its name: the command line is above the jobs.
        import_module("service.cli.main").main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in INTERRUPTED:
        try:
            _keep(code, told.last)
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return NOT_KEPT
    return code


def _keep(code: int, last: str) -> None:
    from db.rows.job_ends import VARIABLE, JobOutcome, keep_end
    from db.store.engine import open_database

    error = None if code == 0 else last or f"exit code {code}"
    with open_database() as database:
        keep_end(database, os.environ[VARIABLE], JobOutcome(exit_code=code, error=error, result=_result()))


def _result() -> object:
    """What the command printed as JSON, None where it is something else, or larger than a job may leave."""
    sys.stdout.flush()
    data = os.pread(1, _MOST_RESULT_BYTES + 1, 0)
    try:
        return json.loads(data) if len(data) <= _MOST_RESULT_BYTES else None
    except ValueError:
        return None


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))

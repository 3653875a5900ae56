"""One job's process: started, followed line by line, ended when it is cancelled, and judged by its exit code.

What it printed and how it ended it keeps itself (`service.jobs.child`): the exit code judges those that could not.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from db.rows.job_ends import JobOutcome

POLL_S = 0.25
END_WITHIN_S = 8.0
"""From the wish that a command ends to its kill: it may still say what it has."""
_MOST_LINES = 20_000
_MOST_LINE = 2000


def run_command(
    arguments: Sequence[str],
    *,
    environment: dict[str, str],
    held: int,
    say: Callable[[list[str]], None],
    is_cancelled: Callable[[], bool],
) -> JobOutcome | None:
    """Run `isochunk ARGUMENTS` -> how it ended; None when it was cancelled.

    environment: beside this process's own. held: a file descriptor that the process keeps open. say: called with the
    lines that it writes, a few times a second. is_cancelled: asked as often.
    """
    with tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.jobs.child", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            pass_fds=[held],
            start_new_session=True,
        )
        lines: queue.Queue[str] = queue.Queue(maxsize=10_000)
        assert process.stderr is not None
        reader = threading.Thread(target=_read, args=(process.stderr, lines), daemon=True)
        reader.start()
        last, cancelled = "", False
        try:
            while True:
                ended = process.poll() is not None
                if ended:
                    reader.join(timeout=POLL_S)
                lines_read = _drained(lines)
                if lines_read:
                    last = lines_read[-1]
                    say(lines_read)
                if ended:
                    break
                if is_cancelled():
                    cancelled = True
                    break
                time.sleep(POLL_S)
        finally:
            end(process)
        if cancelled:
            return None
        return JobOutcome(exit_code=process.returncode, error=_reason(process.returncode, last))


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: first asked, then killed."""
    for number, wait_s in ((signal.SIGTERM, END_WITHIN_S), (signal.SIGKILL, END_WITHIN_S)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    # Ranks end with the command that started them; whatever else is left of its session ends here.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def plan_file(folder: str, content: object) -> Path:
    """A plan as the file that a command takes."""
    path = Path(folder) / "plan.json"
    path.write_text(json.dumps(content))
    return path


def _read(pipe: IO[bytes], lines: queue.Queue[str]) -> None:
    """Hand on what a command writes; of a command that writes without end only the beginning."""
    for count, raw in enumerate(iter(lambda: pipe.readline(_MOST_LINE), b"")):
        line = raw.decode("utf-8", "replace").rstrip()
        if line and count < _MOST_LINES:
            lines.put(line.replace("\0", ""))


def _drained(lines: queue.Queue[str]) -> list[str]:
    found: list[str] = []
    while len(found) < 500:
        try:
            found.append(lines.get_nowait())
        except queue.Empty:
            break
    return found


def _reason(code: int, last: str) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (f" after: {last}" if last else "")
    return last or f"exit code {code}"

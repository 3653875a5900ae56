"""Full disks, read-only places and damaged files under every command: `python -m benchmarks.disk_faults`.

A case passes if the command works or says in one line, with exit code 2, why it does not; if a database that was whole
is whole afterwards and has lost no row; if a damaged one was not written to; and if the same command works, or refuses
for a reason of its own, once the fault is gone. A full disk and a read-only place are a small tmpfs where this user may
mount one; else a limit on the size of files and a folder without the right to write. Exit code 1 if a case fails.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.fuzz_files import COST_MODEL, HARDWARE, PLAN
from db.errors import UserError
from db.files.documents import write_json
from db.rows.archive import export_hardware
from db.rows.hardware import save_hardware
from db.rows.measurements import Measurement, load_measurements, save_measurements
from db.store.engine import open_database
from service.cli.main import main as isochunk
from service.cli.output import print_table

NUM_ROWS = 400
TIMEOUT_S = 120
DISK_KIB = 2048
COMMANDS: dict[str, tuple[str, ...]] = {
    "db list": ("db", "list"),
    "db list measurements": ("db", "list", "measurements"),
    "db check": ("db", "check"),
    "db upgrade": ("db", "upgrade"),
    "db export": ("db", "export", "{disk}/out.json"),
    "db export gz": ("db", "export", "{disk}/out.json.gz"),
    "db import": ("db", "import", "{good}/profile.json"),
    "tune": ("tune", "llama-3.2-1b", "--hardware", "1", "--prompt-lens", "512", "--dtype", "float32"),
    "runs": ("runs",),
    "runs explain": ("runs", "explain"),
    "report -o": ("report", "--hardware", "1", "-o", "{disk}/report.html"),
    "tune -o": ("tune", "--cost-model", "{good}/cost.json", "--prompt-lens", "4096,900", "-o", "{disk}/plan.json"),
}
RUN = ("run-plan", "{good}/plan.json", "--random-weights", "--output", "{disk}/result.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    stderr: str

    @property
    def is_explained(self) -> bool:
        """Whether it worked, or said in one line why not."""
        if self.code == 0:
            return True
        lines = self.stderr.splitlines()
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].isprintable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a case happens: good files in one folder; the disk that is full, read-only or holds damaged files."""

    good: Path
    disk: Path
    mounted: bool

    @property
    def database(self) -> Path:
        """The database on the disk."""
        return self.disk / "profile.db"

    def run(self, command: tuple[str, ...], *, max_file_bytes: int | None = None) -> Done:
        """The command in a process of its own."""
        arguments = [word.format(disk=self.disk, good=self.good) for word in command]
        here, there = os.pipe()  # no file: the limit on files' size would hold for it too
        child = os.fork()
        if child == 0:
            _run_as_child(arguments, f"sqlite:///{self.database}", there, max_file_bytes)
        os.close(there)
        with os.fdopen(here) as said:
            stderr = said.read()
        return Done(code=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stderr=stderr)


def _run_as_child(arguments: list[str], database_url: str, stderr: int, max_file_bytes: int | None) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    code = 1
    try:
        os.environ["ISOCHUNK_DB"] = database_url
        sys.argv = ["isochunk", *arguments]
        signal.alarm(TIMEOUT_S)
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        isochunk()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def full(place: Place, free_kib: int) -> Iterator[int | None]:
    """The disk with so much room left; without a mount, the most bytes that a file may have."""
    if not place.mounted:
        yield free_kib << 10
        return
    filler = place.disk / "filler"
    room = shutil.disk_usage(place.disk).free - (free_kib << 10)
    filler.write_bytes(bytes(max(0, room)))
    yield None
    filler.unlink()


@contextmanager
def read_only(place: Place) -> Iterator[None]:
    """The disk, not to be written to."""
    if place.mounted:
        subprocess.run(["mount", "-o", "remount,ro", str(place.disk)], check=True, timeout=30)
        yield
        subprocess.run(["mount", "-o", "remount,rw", str(place.disk)], check=True, timeout=30)
        return
    place.disk.chmod(0o555)
    yield
    place.disk.chmod(0o755)


@contextmanager
def damaged(place: Place, harm: Callable[[bytearray], bytes]) -> Iterator[None]:
    """The database with its bytes harmed; afterwards it must be as it was then, and is put right."""
    data = harm(bytearray(place.database.read_bytes()))
    place.database.write_bytes(data)
    yield
    if place.database.read_bytes() != data:
        raise AssertionError("a damaged database was written to")


def overwritten(seed: int, size: int) -> Callable[[bytearray], bytes]:
    """Random bytes somewhere behind the first page."""

    def harm(data: bytearray) -> bytes:
        source = random.Random(seed)
        at = source.randrange(4096, max(4097, len(data) - size))
        data[at : at + size] = source.randbytes(min(size, len(data) - at))
        return bytes(data)

    return harm


HARMS: dict[str, Callable[[bytearray], bytes]] = {
    **{f"20,000 bytes overwritten ({seed})": overwritten(seed, 20_000) for seed in range(3)},
    **{f"100 bytes overwritten ({seed})": overwritten(seed, 100) for seed in range(3)},
    "cut in half": lambda data: bytes(data[: len(data) // 2]),
    "a text instead": lambda _data: b"not a database\n" * 100,
}


def refill(place: Place) -> None:
    """The disk as it is at the start: a whole database alone."""
    for path in place.disk.iterdir():
        path.unlink()
    shutil.copy(place.good / "profile.db", place.database)


def loss(place: Place) -> str | None:
    """What the database on the disk has lost, None if nothing."""
    try:
        with open_database(f"sqlite:///{place.database}") as database:
            database.check()
            count = len(load_measurements(database, HARDWARE))
    except UserError as error:
        return str(error)
    return None if count >= NUM_ROWS else f"{NUM_ROWS - count} rows lost"


def cases(place: Place) -> Iterator[tuple[str, str, Done, str | None]]:
    """(fault, command, how it ended, what was lost) of every case."""
    for name, command in {**COMMANDS, "run-plan --output": RUN}.items():
        for free_kib in (0, 8, 40):
            refill(place)
            with full(place, free_kib) as limit:
                done = place.run(command, max_file_bytes=limit)
            yield f"full, {free_kib} KiB left", name, done, loss(place) or _again(place, command)
        refill(place)
        with read_only(place):
            done = place.run(command)
        yield "read-only", name, done, loss(place) or _again(place, command)
    for name, command in COMMANDS.items():
        for fault, harm in HARMS.items() if "{good}/cost.json" not in command else ():
            refill(place)
            lost = None
            try:
                with damaged(place, harm):
                    done = place.run(command)
            except AssertionError as error:
                lost = str(error)
            refill(place)
            yield fault, name, done, lost or _again(place, command)


def _again(place: Place, command: tuple[str, ...]) -> str | None:
    """The command once more, without the fault; a plan that takes half a minute to run is not run again."""
    if command == RUN:
        return None
    done = place.run(command)
    return None if done.is_explained else f"the next command failed: {done.stderr[-200:]}"


@contextmanager
def prepared() -> Iterator[Place]:
    """Good files and a disk."""
    with tempfile.TemporaryDirectory() as folder:
        good, disk = Path(folder) / "good", Path(folder) / "disk"
        good.mkdir()
        disk.mkdir()
        rows = [_row(m) for m in range(1, NUM_ROWS + 1)]
        with open_database(f"sqlite:///{good / 'profile.db'}") as database:
            save_measurements(database, HARDWARE, rows)
            export_hardware(database, save_hardware(database, HARDWARE), good / "profile.json")
        write_json(good / "cost.json", COST_MODEL)
        write_json(good / "plan.json", PLAN)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(disk)]
        found = shutil.which("mount") is not None
        mounted = found and subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode == 0
        try:
            yield Place(good=good, disk=disk, mounted=mounted)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True, timeout=30)


def _row(m: int) -> Measurement:
    return Measurement(
        op="matmul", dtype="float32", shape={"m": m, "n": 512, "k": 256}, num_samples=20, median_us=10.5, p10_us=9.5,
        p90_us=12.5, min_us=9.0, std_us=0.3, noisy=False, measured_at=datetime(2026, 3, 1, tzinfo=UTC),
        code_version="0.1.0",
    )  # fmt: skip


def main() -> None:
    """Run the cases; print a row for each fault and each case that failed."""
    import service.use_cases.tune  # noqa: F401 - once, before the commands' processes part from this one

    counts: Counter[tuple[str, str]] = Counter()
    failed = []
    with prepared() as place:
        for fault, name, done, lost in cases(place):
            good = done.is_explained and lost is None
            counts[fault, "worked" if good and done.code == 0 else "refused in one line" if good else "failed"] += 1
            if not good:
                failed.append(f"{name}, {fault}: exit code {done.code}; {done.stderr[-300:].strip()}; {lost}")
        kind = f"tmpfs of {DISK_KIB} KiB" if place.mounted else "limit on files' size, folder without write permission"
    ends = ("worked", "refused in one line", "failed")
    faults = list(dict.fromkeys(fault for fault, _ in counts))
    print_table(("fault", *ends), [[fault, *(counts[fault, end] for end in ends)] for fault in faults], title=kind)
    for line in failed:
        print(line)
    print(f"{sum(counts.values())} cases, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""The transcripts of the README: run as they stand there, and written anew by `python -m tests.transcripts`.

A block of ```console holds commands after `$ ` and what they print; a line `...` stands for the rest of an output.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.structures import ROOT

README = ROOT / "README.md"
FENCE = "```console\n"
REST = "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownCommand:
    """A command and what the README says that it prints."""

    command: str
    printed: str

    @property
    def is_cut(self) -> bool:
        """Whether only the beginning is shown."""
        return f"\n{self.printed}".rstrip("\n").endswith(f"\n{REST}")

    @property
    def shown(self) -> str:
        """What is shown of it."""
        return self.printed.rstrip("\n").removesuffix(REST).rstrip()


def transcripts(text: str) -> list[list[ShownCommand]]:
    """The blocks of a text."""
    return [_steps(part.split("```")[0]) for part in text.split(FENCE)[1:]]


def _steps(block: str) -> list[ShownCommand]:
    found = []
    for part in f"\n{block}".split("\n$ ")[1:]:
        command, _, printed = part.partition("\n")
        while command.endswith("\\"):
            more, _, printed = printed.partition("\n")
            command = f"{command[:-1]}{more.strip()}"
        found.append(ShownCommand(command=command, printed=printed))
    return found


def run(command: str, folder: Path) -> str:
    """What a command prints in a terminal of 80 columns, in a folder that has the repository's benchmarks."""
    link = folder / "benchmarks"
    if not link.exists():
        link.symlink_to(ROOT / "benchmarks")
    (folder / "isochunk").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m service "$@"\n')
    (folder / "isochunk").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1",
        "ISOCHUNK_DB": f"sqlite:///{folder / 'isochunk.db'}",
    }  # fmt: skip
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def is_shown(shown: str, printed: str) -> bool:
    """Whether the same words are printed, and numbers within 2 %: the last digit depends on the processor."""
    words, others = shown.split(), printed.split()
    return len(words) == len(others) and all(map(_is_like, words, others))


def _is_like(word: str, other: str) -> bool:
    if word == other:
        return True
    try:
        number, another = (float(text.strip("(),;:%s").replace(",", "")) for text in (word, other))
    except ValueError:
        return False
    return abs(number - another) <= 0.02 * abs(number)


def main() -> None:
    """Write the README's transcripts anew, each cut after as many lines as it has now."""
    before, *parts = README.read_text().split(FENCE)
    with TemporaryDirectory() as name:
        for index, part in enumerate(parts):
            block, _, after = part.partition("```")
            written = "".join(f"$ {step.command}\n{_shown(step, Path(name))}" for step in _steps(block))
            parts[index] = f"{written}```{after}"
    README.write_text(FENCE.join([before, *parts]))


def _shown(step: ShownCommand, folder: Path) -> str:
    printed = run(step.command, folder)
    if step.is_cut:
        printed = "\n".join([*printed.splitlines()[: len(step.shown.splitlines())], REST])
    return f"{printed.strip(chr(10))}\n" if printed.strip() else ""


if __name__ == "__main__":
    main()

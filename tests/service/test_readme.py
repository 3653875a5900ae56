"""The README's commands, run one after another as they stand there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.structures import ROOT
from tests.transcripts import is_shown, run, transcripts

README = (ROOT / "README.md").read_text()
COST_MODEL = README.partition("cat > cost.json <<'END'\n")[2].partition("END\n")[0]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return [part.split("```")[0] for part in README.split(f"```{language}\n")[1:]]


@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama", max_position_embeddings=2048)
    (tmp_path / "cost.json").write_text(COST_MODEL)
    environment = os.environ | {"ISOCHUNK_DB": f"sqlite:///{tmp_path / 'isochunk.db'}", "OMP_NUM_THREADS": "1"}
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("isochunk ")]
    assert {command.split()[1] for command in commands} == {"profile", "tune", "export", "run-plan", "db", "runs"}
    for command in commands:
        program = [sys.executable, "-m", "service", *shlex.split(command)[1:]]
        done = subprocess.run(
            program,
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for name in ("plan.json", "trace.json", "result.json", "hardware.json", "rounds.json", "measured.json"):
        assert json.loads((tmp_path / name).read_text())


@pytest.mark.timeout(280)
def test_the_transcripts_of_the_readme_are_true(tmp_path: Path) -> None:
    blocks_of_steps = transcripts(README)
    assert len(blocks_of_steps) == 2  # two questions, each answered in at most three commands
    for steps in blocks_of_steps:
        assert sum("isochunk" in step.command.split()[0] for step in steps) <= 3
        for step in steps:
            printed = run(step.command, tmp_path)
            shown = "\n".join(printed.splitlines()[: len(step.shown.splitlines())]) if step.is_cut else printed
            assert is_shown(step.shown, shown), f"{step.command}: python -m tests.transcripts"
            assert all(len(line) <= 80 for line in printed.splitlines())


@pytest.mark.timeout(60)
def test_the_python_of_the_readme_works(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text(COST_MODEL)
    for block in blocks("python"):
        subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            check=True,
            timeout=50,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )


def test_the_targets_of_the_readme_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert targets == ["demo", "serve", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_link_leads_somewhere() -> None:
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links
    assert all((ROOT / link).exists() for link in links)

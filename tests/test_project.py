from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from db.files.archive import import_hardware
from db.store.engine import open_database
from tests.structures import FOLDERS, PAGE, ROOT, docstring, page
from tests.tuner.atom import atom

LAYERS = ("db", "profiler", "tuner", "runtime", "service")
COMMANDS = ([], ["profile"], ["tune"], ["run-plan"], ["db"])
HEAVY = ("torch", "transformers", "pandas", "scipy", "optuna", "sqlalchemy", "numpy", "rich")


def test_structures_page_names_every_module() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.structures"


def test_every_module_says_what_it_is() -> None:
    silent = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not docstring(path)]
    assert silent == []


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_go_one_way(folder: str) -> None:
    below = LAYERS[: LAYERS.index(folder) + 1]
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top not in LAYERS or top in below, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("pattern", "owner"),
    [(r"(?<!AutoModel)ForCausalLM", "model/architectures.py"), (r"getattr\(torch, ", "model/precision.py")],
)
def test_one_module_knows_architectures_and_one_knows_formats(pattern: str, owner: str) -> None:
    paths = [path for folder in LAYERS for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in paths if re.search(pattern, path.read_text())] == [ROOT / "profiler" / owner]


def test_no_other_distribution_owns_our_names() -> None:
    owners = packages_distributions()
    for name in LAYERS:
        assert set(owners.get(name, ["isochunk"])) == {"isochunk"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments) or "isochunk")
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from service.cli.main import cli\n"
        f"try: cli({[*arguments, '--help']!r}, prog_name='isochunk')\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: isochunk" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_running_a_plan_needs_no_fit() -> None:
    program = (
        "import sys, runtime.run.run, runtime.run.rank; print(sorted({'pandas', 'scipy', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("service.use_cases.tune", {"torch", "pandas", "scipy", "sqlalchemy", "optuna"}),
        ("service.use_cases.tune_model", {"torch"}),
    ],
)
def test_planning_needs_no_torch_and_from_a_cost_model_no_fit(module: str, unneeded: set[str], tmp_path: Path) -> None:
    cost, url = tmp_path / "cost.json", f"sqlite:///{tmp_path / 'cards.db'}"
    cost.write_text(json.dumps(atom(4).to_json()))
    arguments = ["--cost-model", str(cost), "--pp-size", "4", "--prompt-lens", "65536,4096", "--compare"]
    if module == "service.use_cases.tune_model":
        with open_database(url) as database:
            import_hardware(database, ROOT / "benchmarks/results/h100x2-pcie-like.profile.json.gz")
        arguments = ["llama-3-8b", "--world-size", "2", "--prompt-lens", "4096", "--db", url]
    program = (
        "import sys\n"
        "from service.cli.main import cli\n"
        f"cli(['tune', *{arguments!r}], standalone_mode=False)\n"
        f"print({module!r} in sys.modules, sorted({unneeded!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "True []"


def test_an_unknown_command_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "fly"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from db.rows.archive import import_hardware
from db.store.engine import open_database
from profiler.hardware.device import CARD_FILES
from tests.structures import FOLDERS, ROOMS, ROOT, docstring, written
from tests.tuner.atom import atom

LAYERS = tuple(ROOMS)
MOST_FILES = 12
COMMANDS = (
    [], ["profile"], ["tune"], ["run-plan"], ["quantize"], ["prune"], ["train"], ["export"], ["serve"], ["token"],
    ["worker"], ["db"], ["runs"], ["report"], ["completion"],
)  # fmt: skip
HEAVY = ("torch", "transformers", "pandas", "scipy", "optuna", "sqlalchemy", "numpy", "rich", "fastapi", "dbos")


READS = {"open", "read_text", "read_bytes", "safe_open"}
# Modules outside of db/files that open files, none of which a user writes but safetensors, whose package reads them.
OWN_FILES = {
    "db/store/leases.py", "profiler/model/bundled.py", "profiler/hardware/device.py", "profiler/comm/ranks/mark.py",
    "profiler/comm/ranks/torchrun.py", "profiler/comm/ranks/launch.py", "profiler/comm/ranks/rank.py",
    "profiler/comm/ranks/stall.py", "profiler/comm/ranks/folder.py", "runtime/weights/checkpoint.py",
    "service/jobs/machine.py", "service/http/client.py", "service/http/routes/site.py", "service/cli/main.py",
    "service/http/planning/processes.py",
}  # fmt: skip


def modules() -> list[Path]:
    """All modules of the product."""
    return [path for folder in ROOMS for path in (ROOT / folder).rglob("*.py") if "versions" not in path.parts]


def imported(path: Path) -> list[str]:
    """Names of all modules that a module imports, within functions too; packages' names when it takes a module."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_structures_page_names_every_module() -> None:
    for path, text in written():
        assert path.read_text() == text, f"write {path.name} anew: python -m tests.structures"


def test_every_module_says_what_it_is() -> None:
    silent = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not docstring(path)]
    assert silent == []


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_go_one_way(folder: str) -> None:
    below = list(ROOMS)[: list(ROOMS).index(folder)]
    rooms = ROOMS[folder]
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT / folder).parts
        # A module beside the rooms may be imported by all of them.
        mine = rooms.index(parts[0]) if parts[0] in rooms else len(rooms) if parts[0] == "__main__.py" else -1
        for name in imported(path):
            top, *rest = name.split(".")
            if top == folder and rest and rest[0] in rooms:
                assert rooms.index(rest[0]) <= mine, f"{path} imports {name}"
            assert top not in ROOMS or top == folder or top in below, f"{path} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    module_of = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()}
    imports = {name: set(imported(path)) & set(module_of.values()) for path, name in module_of.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way, name))}"
        if name not in done:
            for other in imports[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in imports:
        visit(name, ())


def test_every_folder_says_what_lives_there_and_none_is_crowded() -> None:
    for folder in {path.parent for path in modules()}:
        files = [path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
        assert len(files) <= MOST_FILES, f"{folder}: {len(files)} files"
        assert docstring(folder / "__init__.py"), folder


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


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
        ("service.use_cases.tune_model", {"torch", "pandas", "scipy", "optuna"}),
    ],
)
def test_planning_needs_no_torch_and_from_a_cost_model_no_fit(module: str, unneeded: set[str], tmp_path: Path) -> None:
    cost, url = tmp_path / "cost.json", f"sqlite:///{tmp_path / 'cards.db'}"
    cost.write_text(json.dumps(atom(4).to_json()))
    arguments = ["--cost-model", str(cost), "--pp-size", "4", "--prompt-lens", "65536,4096", "--compare"]
    if module == "service.use_cases.tune_model":
        with open_database(url) as database:
            import_hardware(database, ROOT / "benchmarks/results/h100x2-pcie-like.profile.json.gz")
        asked = [] if any(map(os.path.exists, CARD_FILES)) else ["--device", "cuda"]  # no card here: that one is meant
        arguments = ["llama-3-8b", "--world-size", "2", "--prompt-lens", "4096", "--db", url, *asked]
    program = (
        "import sys\n"
        "from service.cli.main import cli\n"
        f"cli(['tune', *{arguments!r}], standalone_mode=False)\n"
        f"print({module!r} in sys.modules, sorted({unneeded!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "True []"


def test_files_of_users_are_read_by_one_module() -> None:
    reading = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in READS:
                    reading.add(str(path.relative_to(ROOT)))
    assert {module for module in reading if not module.startswith("db/files/")} == OWN_FILES


def test_an_unknown_command_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "fly"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr

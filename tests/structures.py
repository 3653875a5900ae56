"""Writes docs/structures.md from the first sentence of each module's docstring: `python -m tests.structures`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structures.md"
FOLDERS = ("db", "profiler", "tuner", "runtime", "service", "benchmarks")
HEADER = """# Structures

Imports go one way, `db <- profiler <- tuner <- runtime <- service`, and so does the data: measured rows are kept,
fitted, searched, executed, and what was executed is kept again. One sentence a module, its docstring's first
(`python -m tests.structures` writes this page).
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEADER]
    for folder in FOLDERS:
        lines = [f"## {folder}/", "", docstring(ROOT / folder / "__init__.py"), ""]
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if path.name == "__init__.py" or "versions" in inside.parts:
                continue
            lines.append(f"- `{inside.with_suffix('')}`: {docstring(path)}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def docstring(path: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(page())

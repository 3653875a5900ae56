"""Writes the module list of docs/structures.md and the picture of the rooms: `python -m tests.structures`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structures.md"
PICTURE = ROOT / "docs" / "rooms.svg"
FOLDERS = ("db", "profiler", "tuner", "runtime", "service", "benchmarks")
# Folders and their rooms, from the bottom up: each may import those before it.
ROOMS = {
    "db": ("files", "store", "rows"),
    "profiler": (
        "hardware",
        "library",
        "model",
        "sequence",
        "kernels",
        "layers",
        "library_layers",
        "experts",
        "comm",
        "points",
        "measure",
    ),
    "tuner": (
        "plan",
        "workload",
        "training",
        "serving",
        "recurrence",
        "rounds",
        "online",
        "policies",
        "fit",
        "replays",
        "search",
        "waterfall",
    ),
    "runtime": ("job", "weights", "stage", "run", "quantize", "prune", "train"),
    "service": ("pictures", "reasons", "use_cases", "reports", "engines", "jobs", "http", "cli"),
}
ASKED = {
    "db": "storage",
    "profiler": "measurement",
    "tuner": "planning",
    "runtime": "execution",
    "service": "interfaces",
}
LIST = "## Every module\n"
_ROOM_WIDTH, _ROOM_HEIGHT, _GAP, _LEFT = 104, 34, 12, 190


def page() -> str:
    """The page as it should be: what is written by hand, and the list of modules made anew."""
    by_hand, _, _ = PAGE.read_text().partition(LIST)
    parts = [by_hand + LIST]
    for folder in FOLDERS:
        parts.append(f"### {folder}/\n\n{docstring(ROOT / folder / '__init__.py')}\n")
        groups = sorted({path.parent for path in modules(folder)})
        for group in groups:
            inside = group.relative_to(ROOT)
            if group != ROOT / folder:
                parts.append(f"**{inside}/** {docstring(group / '__init__.py')}\n")
            lines = [f"- `{path.stem}`: {docstring(path)}" for path in modules(folder) if path.parent == group]
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def modules(folder: str) -> list[Path]:
    """Modules of a folder and its rooms, packages' own files and migrations left out."""
    found = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in found if path.name != "__init__.py" and "versions" not in path.parts]


def docstring(path: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def picture() -> str:
    """The rooms as SVG: a row a folder, the lowest at the bottom; each imports what is below and to its left."""
    rows = list(reversed(ROOMS.items()))
    width = _LEFT + max(len(rooms) for rooms in ROOMS.values()) * (_ROOM_WIDTH + _GAP) + _GAP
    row_height = _ROOM_HEIGHT + 4 * _GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(rows) * row_height + _GAP}" '
        'font-family="sans-serif" font-size="13">',
        "<style>text{fill:#222}.row{fill:#f2f4f7;stroke:#c5ccd6}.room{fill:#fff;stroke:#5b7ba6}.asked{fill:#667}"
        ".arrow{stroke:#5b7ba6;stroke-width:1.5;fill:none}"
        "@media(prefers-color-scheme:dark){text{fill:#e6e8ec}.row{fill:#1d2229;stroke:#3a4350}"
        ".room{fill:#2a313b;stroke:#7fa3d1}.asked{fill:#9aa3b0}}</style>",
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#5b7ba6"/></marker></defs>',
    ]
    for index, (folder, rooms) in enumerate(rows):
        top = _GAP + index * row_height
        lines.append(
            f'<rect class="row" x="{_GAP}" y="{top}" width="{width - 2 * _GAP}" height="{row_height - _GAP}" rx="6"/>'
        )
        lines.append(f'<text x="{2 * _GAP}" y="{top + 26}" font-weight="bold">{folder}/</text>')
        lines.append(f'<text class="asked" x="{2 * _GAP}" y="{top + 46}">{escape(ASKED[folder])}</text>')
        for column, room in enumerate(rooms):
            left = _LEFT + column * (_ROOM_WIDTH + _GAP)
            lines.append(
                f'<rect class="room" x="{left}" y="{top + _GAP}" width="{_ROOM_WIDTH}" height="{_ROOM_HEIGHT}" rx="4"/>'
                f'<text x="{left + _ROOM_WIDTH / 2}" y="{top + _GAP + 22}" text-anchor="middle">{room}</text>'
            )
        if index < len(rows) - 1:
            x, y = 150, top + row_height - _GAP
            lines.append(f'<path class="arrow" marker-end="url(#tip)" d="M{x},{y - 8} L{x},{y + _GAP + 8}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def written() -> Iterator[tuple[Path, str]]:
    """The files that this writes, and what should be in them."""
    yield PAGE, page()
    yield PICTURE, picture()


if __name__ == "__main__":
    for path, text in list(written()):
        path.write_text(text)

"""Output of commands: aligned tables for people, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from numbers import Real
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from db.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PAGE_WIDTH = 80
"""Characters in a line of what people read, where no terminal says otherwise."""


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Print rows under their columns: numbers to the right, None as `-`; off a terminal nothing is cut or folded."""
    table, title = _table(columns, rows, title), printable(title or "")
    console = _console()
    if not console.is_terminal:
        console = _console(width=max(_width(table), len(title)))
    console.print(table)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """Print rows so that they fit the terminal, or a page of PAGE_WIDTH characters off one.

    The columns stand in the order of their worth: of several rows those that do not fit beside the ones before are left
    out and named below; a single row that does not fit stands upright, a line a column.
    """
    console = _console()
    width = console.width if console.is_terminal else page_width()
    shown: list[int] = []
    for index in range(len(columns)):
        if not shown or _width(_table(*_some(columns, rows, [*shown, index]))) <= width:
            shown.append(index)
    left_out = [name for index, name in enumerate(columns) if index not in shown]
    if len(rows) == 1 and left_out:
        show_pairs([(name, _cell(value)) for name, value in zip(columns, rows[0], strict=True)], title)
        return
    if title:
        print(wrapped(printable(title), width))
    _console(width=width).print(_table(*_some(columns, rows, shown)))
    if left_out:
        print(wrapped(f"A wider terminal and --json have also {', '.join(left_out)}.", width) + "\n")


def _some(columns: Sequence[str], rows: Sequence[Sequence[object]], shown: Sequence[int]) -> tuple[Any, Any]:
    return [columns[index] for index in shown], [[row[index] for index in shown] for row in rows]


def show_pairs(pairs: Sequence[tuple[str, str]], title: str | None = None) -> None:
    """Print names and what belongs to each, in two columns that fit a page; long texts are wrapped."""
    if title:
        print(wrapped(printable(title), page_width()))
    margin = 2 + max(len(name) for name, _ in pairs) + 2
    for name, text in pairs:
        lines = textwrap.wrap(printable(text), max(20, page_width() - margin), break_on_hyphens=False) or [""]
        print(f"  {name}".ljust(margin) + f"\n{' ' * margin}".join(lines))
    print()


def wrapped(words: str, width: int = PAGE_WIDTH) -> str:
    """Words in lines of a page's width; none is broken."""
    return textwrap.fill(words, width, break_long_words=False, break_on_hyphens=False)


def page_width() -> int:
    """Characters in a line: those of a terminal or of COLUMNS, at most PAGE_WIDTH of running text."""
    return min(PAGE_WIDTH, max(40, shutil.get_terminal_size((PAGE_WIDTH, 24)).columns))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = None if title is None else printable(title)
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows if row[index] is not None]
        is_number = bool(cells) and all(isinstance(cell, Real) and not isinstance(cell, bool) for cell in cells)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _console(width: int | None = None) -> Console:
    """One that leaves it to the caller that its reader has gone away."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return Plain(width=width)


@contextmanager
def working(words: str) -> Iterator[None]:
    """Show on a terminal that something is done, and for how long; nothing of it stays, or is shown elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, refresh_per_second=2, redirect_stdout=False) as shown:
        shown.add_task(words)
        yield


def _width(table: Table) -> int:
    """Of the table where nothing is folded."""
    console = _console()
    return console.measure(table, options=console.options.update(max_width=100_000)).maximum


def print_json(value: object) -> None:
    """Print JSON: dataclasses as objects, times in ISO 8601, paths as text. Raises ValueError for NaN."""
    json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return printable(str(value))


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, PurePath) else value

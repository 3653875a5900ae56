"""Renders a report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from db.errors import printable

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
    "th,td{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}svg{width:100%;height:auto}"
    "@media(prefers-color-scheme:dark){body{color:#e6e8ec;background:#16181d}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading with a picture, words, or a table below it."""

    title: str
    picture: str = ""
    words: str = ""
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[object]] = field(default=())


def page(title: str, sections: Sequence[Section]) -> str:
    """The sections in order. Names come from files: all but pictures is escaped."""
    body = "\n".join(map(_section, sections))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style>\n<h1>{_safe(title)}</h1>\n{body}\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{_safe(section.title)}</h2>"]
    if section.words:
        parts.append(f"<p>{_safe(section.words)}</p>")
    if section.picture:
        parts.append(section.picture)
    if section.rows:
        head = "".join(f"<th>{_safe(name)}</th>" for name in section.columns)
        lines = "".join(
            f"<tr>{''.join(f'<td>{_safe(_shown(cell))}</td>' for cell in row)}</tr>" for row in section.rows
        )
        parts.append(f"<table>{f'<tr>{head}</tr>' if head else ''}{lines}</table>")
    return "\n".join(parts)


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _safe(words: str) -> str:
    return escape(printable(words))

"""Shapes of the pictures, as SVG that follows the reader's light or dark scheme."""

from __future__ import annotations

from xml.sax.saxutils import escape

STYLE = (
    "<style>text{fill:#222}.soft{fill:#667}.light{fill:#fff}.axis{stroke:#889;fill:none}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e8ec}.soft{fill:#9aa3b0}.light{fill:#fff}}</style>"
)


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", bold: bool = False) -> str:
    """Words at a place."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    """A filled rectangle, with a title that shows under the pointer."""
    words = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{height:.1f}" fill="{colour}">'
        f"{words}</rect>"
    )

"""What pictures are made of: texts, boxes, lines, and axes with round numbers, as SVG that follows a dark theme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from db.errors import cut

# Seven colours of Okabe and Ito (2008), which colour-blind people tell apart, grey, and four more that are as far from
# all of them, in CIELAB, as those are from each other.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
           "#8C6BB1", "#9E0142", "#B3E2CD", "#F3CF80")  # fmt: skip
LINE_COLOURS = tuple(colour for colour in COLOURS if colour not in ("#F0E442", "#B3E2CD", "#F3CF80"))
"""Those that are dark enough for a thin line on white."""
STYLE = (
    "<style>text{fill:#222}.soft{fill:#667}.light{fill:#fff}.axis{stroke:#889;fill:none}.bubble{fill:#e3e6ea}"
    ".line{fill:none;stroke-width:1.8}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e8ec}.soft{fill:#9aa3b0}.light{fill:#fff}.bubble{fill:#30363d}}"
    "</style>"
)
FONTS = "Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
WIDTH = 860
CHARACTER = 7.5
"""Widest mean width of a character in a legend or at a tick."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Part of a picture: elements from 0 to its height."""

    height: float
    elements: tuple[str, ...]


def document(panels: Sequence[Panel]) -> str:
    """The panels below each other as one SVG."""
    top, parts = 0.0, []
    for panel in panels:
        parts.append(f'<g transform="translate(0 {top:.0f})">')
        parts += [*panel.elements, "</g>"]
        top += panel.height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" font-family="{FONTS}" font-size="13">'
    )
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", bold: bool = False) -> str:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    """A filled rectangle; the title is shown when it is pointed at."""
    words = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{height:.1f}" fill="{colour}">'
        f"{words}</rect>"
    )


def legend(names: Sequence[str], colours: Sequence[str], y: float, *, left: float = 70.0) -> tuple[list[str], float]:
    """Names with their colours, as many a row as fit, and the height that they take; the middle of a name that is
    longer than a row is left out."""
    out, x, top = [], left, y
    most = int((WIDTH - 40 - left) / CHARACTER)
    for name, colour in zip((cut(name, most) for name in names), colours, strict=True):
        width = 30 + CHARACTER * len(name)
        if x + width > WIDTH - 10:
            x, y = left, y + 20
        out += [box(x, y, 12, 12, colour), text(x + 17, y + 11, name, kind="soft")]
        x += width
    return out, y + 24 - top


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's number: thousands apart, no power of ten for those that are drawn here."""
    return f"{value:,.10g}" if value < 1e9 else f"{value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """A plot's frame from data to points: x from `x_range` to `left`..`right`, y from `y_range` upwards."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    top: float
    height: float
    left: float = 70.0
    right: float = WIDTH - 20.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data is drawn."""
        return (
            self.left + (x - self.x_range[0]) / _width(self.x_range) * (self.right - self.left),
            self.top + self.height * (1.0 - (y - self.y_range[0]) / _width(self.y_range)),
        )

    def frame(self, x_name: str, y_name: str, *, with_y: bool = True) -> list[str]:
        """The axes with their numbers and names."""
        bottom = self.top + self.height
        out = [f'<path class="axis" d="M{self.left:.1f} {self.top:.1f}V{bottom:.1f}H{self.right:.1f}"/>']
        for value in ticks(*self.x_range, count=8):
            x, _ = self.at(value, self.y_range[0])
            label = number(value)
            inside = min(x, WIDTH - 2 - CHARACTER * len(label) / 2)  # the last may stand at the picture's edge
            out += [
                f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>',
                text(inside, bottom + 18, label, anchor="middle"),
            ]
        for value in ticks(*self.y_range) if with_y else ():
            _, y = self.at(self.x_range[0], value)
            out += [
                f'<path class="axis" d="M{self.left:.1f} {y:.1f}h-4"/>',
                text(self.left - 8, y + 4, number(value), anchor="end"),
            ]
        middle = (self.left + self.right) / 2
        return [
            *out,
            text(middle, bottom + 36, x_name, anchor="middle", kind="soft"),
            text(12, self.top - 14, y_name, kind="soft"),
        ]

    def line(self, points: Iterable[tuple[float, float]], colour: str, title: str = "", *, dots: bool = False) -> str:
        """A line through points of the data."""
        placed = [self.at(x, y) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        marks = "".join(_dot(x, y, colour, title) for x, y in placed) if dots else ""
        return f'<path class="line" stroke="{colour}" d="{path}"><title>{escape(title)}</title></path>{marks}'

    def dot(self, x: float, y: float, colour: str, title: str) -> str:
        """A dot at a point of the data; the title is shown when it is pointed at."""
        return _dot(*self.at(x, y), colour, title)


def _dot(x: float, y: float, colour: str, title: str) -> str:
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.7">'
    return f"{circle}<title>{escape(title)}</title></circle>"


def _width(span: tuple[float, float]) -> float:
    return max(span[1] - span[0], 1e-12)

"""Pictures of a report, as SVG: timelines, rounds in the causal triangle, points over a line, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from service.pictures.svg import STYLE, box, text

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
TOLD = "#BBBBBB"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 320, 90, 20, 20, 50
MOST_BARS = 20_000
Bar = tuple[float, float]


def timeline(rows: Sequence[tuple[str, Sequence[Bar], Sequence[Bar]]]) -> str:
    """A row for each stage with (start, finish) of its rounds: measured ones below the predicted ones, in grey."""
    end = max((finish for _, told, measured in rows for _, finish in (*told, *measured)), default=0.0) or 1.0
    scale, out = (WIDTH - LEFT - RIGHT) / end, []
    for index, (name, told, measured) in enumerate(rows):
        y = TOP + 44 * index
        out.append(text(LEFT - 8, y + 22, name, anchor="end"))
        for bars, top, is_told in ((told, y, True), (measured, y + 18, False)):
            for number, (start, finish) in enumerate(bars[: MOST_BARS // max(1, len(rows))]):
                colour = TOLD if is_told and measured else COLOURS[number % len(COLOURS)]
                title = f"round {number}: {start:.4g} to {finish:.4g} s"
                out.append(box(LEFT + scale * start, top, scale * (finish - start), 15, colour, title))
    height = TOP + 44 * len(rows) + BOTTOM
    out += [text(LEFT + scale * end * part, height - 20, f"{end * part:.3g} s", kind="soft") for part in (0, 0.5, 0.95)]
    return _svg(out, height)


def triangle(rounds: Sequence[Sequence[tuple[int, int]]], longest: int) -> str:
    """Which queries of a prompt each round runs over which keys: (start, end) of its chunks."""
    size = WIDTH // 2
    scale, out = (size - 70) / max(1, longest), []
    for number, chunks in enumerate(rounds[:MOST_BARS]):
        for start, end in chunks:
            x, y = 60.0, 10 + scale * start
            title = f"round {number}: tokens {start} to {end}"
            out.append(box(x, y, scale * end, scale * (end - start), COLOURS[number % len(COLOURS)], title))
    corner = 60 + scale * longest, 10 + scale * longest
    out.append(f'<path class="axis" d="M60 10L{corner[0]:.1f} {corner[1]:.1f}L60 {corner[1]:.1f}Z"/>')
    out += [text(55, corner[1], f"{longest}", anchor="end", kind="soft"), text(55, 20, "0", anchor="end", kind="soft")]
    out.append(text(60, corner[1] + 18, "keys, each round's queries from the top down", kind="soft"))
    return _svg(out, size)


def points(pairs: Sequence[tuple[float, float, str]], x_name: str, y_name: str) -> str:
    """Points (x, y, title) over the line where both are equal."""
    most = 1.05 * max((max(x, y) for x, y, _ in pairs), default=1.0)
    side = HEIGHT - TOP - BOTTOM
    out = [f'<path class="axis" d="M{LEFT} {TOP + side}L{LEFT + side} {TOP}"/>']
    for x, y, title in pairs[:MOST_BARS]:
        out.append(_dot(LEFT + side * x / most, TOP + side * (1 - y / most), COLOURS[0], title))
    out += [text(LEFT, HEIGHT - 10, f"{x_name}, 0 to {most:.3g}", kind="soft"), text(10, 14, y_name, kind="soft")]
    return _svg(out, HEIGHT)


def curves(named: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, limit: float | None) -> str:
    """Lines through (x, y), x on a logarithmic scale; limit: a line that none should be above."""
    every = [each for line in named.values() for each in line]
    if not every:
        return ""
    low, high = (math.log(choose(x for x, _ in every)) for choose in (min, max))
    most, wide = 1.05 * max([y for _, y in every] + [limit or 0.0]), max(high - low, 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT - 170) * (math.log(x) - low) / wide,
            TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - y / most),
        )

    out = []
    for index, (name, line) in enumerate(named.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [at(x, y) for x, y in sorted(line)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [
            _dot(x, y, colour, f"{name}: {value:.4g}") for (x, y), (_, value) in zip(places, sorted(line), strict=True)
        ]
        out.append(box(WIDTH - 170, TOP + 18 * index, 10, 10, colour))
        out.append(text(WIDTH - 155, TOP + 10 + 18 * index, name, kind="soft"))
    if limit:
        y = at(math.exp(low), limit)[1]
        out.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT - 170}"/>')
        out.append(text(LEFT + 4, y + 14, f"published peak {limit:.3g}", kind="soft"))
    out += [text(LEFT, HEIGHT - 10, f"{x_name}, {math.exp(low):.0f} to {math.exp(high):.0f}", kind="soft")]
    out += [text(10, 14, y_name, kind="soft"), text(LEFT - 6, TOP + 10, f"{most:.3g}", anchor="end", kind="soft")]
    return _svg(out, max(HEIGHT, TOP + 18 * len(named) + 10))


def bars(rows: Sequence[tuple[str, float]], unit: str) -> str:
    """A bar for each name."""
    most, out = max((value for _, value in rows), default=1.0) or 1.0, []
    for index, (name, value) in enumerate(rows):
        y, width = 10 + 24 * index, (WIDTH - 420) * value / most
        out += [text(300, y + 13, name, anchor="end"), box(308, y, width, 16, COLOURS[0], f"{value:.4g} {unit}")]
        out.append(text(314 + width, y + 13, f"{value:.4g} {unit}", kind="soft"))
    return _svg(out, 20 + 24 * len(rows))


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{title}</title></circle>'


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="13"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', STYLE, *parts, "</svg>"])

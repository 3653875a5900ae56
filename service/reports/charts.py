"""Pictures of a report, as SVG: rounds in the causal triangle, and curves of what a device reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from service.pictures.svg import COLOURS, WIDTH, Axes, Panel, box, document, legend, text

MOST_BOXES = 20_000


def triangle(rounds: Sequence[Sequence[tuple[int, int]]], longest: int) -> str:
    """Which queries of a prompt each round runs over which keys: (start, end) of its chunks."""
    size = WIDTH // 2
    scale, out = (size - 70) / max(1, longest), []
    for number, chunks in enumerate(rounds[:MOST_BOXES]):
        for start, end in chunks:
            x, y = 60.0, 10 + scale * start
            title = f"round {number}: tokens {start} to {end}"
            out.append(box(x, y, scale * end, scale * (end - start), COLOURS[number % len(COLOURS)], title))
    corner = 60 + scale * longest, 10 + scale * longest
    out.append(f'<path class="axis" d="M60 10L{corner[0]:.1f} {corner[1]:.1f}L60 {corner[1]:.1f}Z"/>')
    out += [text(55, corner[1], f"{longest}", anchor="end", kind="soft"), text(55, 20, "0", anchor="end", kind="soft")]
    out.append(text(60, corner[1] + 18, "keys, each round's queries from the top down", kind="soft"))
    return document([Panel(size, tuple(out))])


def curves(named: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, limit: float | None) -> str:
    """Lines through (x, y), x as its logarithm to base 2; limit: a line at the published peak."""
    every = [(math.log2(x), y) for line in named.values() for x, y in line]
    xs, most = [x for x, _ in every], 1.05 * max([y for _, y in every] + [limit or 0.0])
    axes = Axes(x_range=(min(xs), max(xs)), y_range=(0.0, most), top=30.0, height=250.0)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(named))]
    out = axes.frame(f"{x_name}, 2 to the power of", y_name)
    for (name, line), colour in zip(named.items(), colours, strict=True):
        out.append(axes.line([(math.log2(x), y) for x, y in sorted(line)], colour, name, dots=True))
    if limit:
        out.append(axes.line([(min(xs), limit), (max(xs), limit)], "#889", f"published peak {limit:.3g}"))
    entries, used = legend(list(named), colours, 330.0)
    return document([Panel(340.0 + used, (*out, *entries))])

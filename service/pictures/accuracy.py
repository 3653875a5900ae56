"""Predicted against measured seconds: a dot each, on the diagonal where the prediction was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pictures.svg import COLOURS, Axes, Panel, legend, text

TOP, HEIGHT = 60.0, 320.0
MOST_DOTS = 20_000


@dataclass(frozen=True, slots=True)
class AccuracyPair:
    """One prediction with its measurement; pairs of one group have one colour."""

    group: str
    predicted_s: float
    measured_s: float
    name: str


def accuracy_panel(pairs: Sequence[AccuracyPair], what: str) -> list[Panel]:
    """One panel in milliseconds, none without pairs. what: the noun for the pairs, in the title."""
    if not pairs:
        return []
    most = 1.05e3 * max(max(one.predicted_s, one.measured_s) for one in pairs)
    axes = Axes(x_range=(0.0, most), y_range=(0.0, most), top=TOP, height=HEIGHT, right=70.0 + 1.6 * HEIGHT)
    ratios = sorted(one.predicted_s / max(one.measured_s, 1e-12) - 1.0 for one in pairs)
    middle = ratios[len(ratios) // 2]
    out = [text(12, 20, f"Predicted against measured: {len(pairs)} {what}, {middle:+.1%} in the median", bold=True)]
    out.append(axes.line([(0.0, 0.0), (most, most)], "#889", "as predicted"))
    groups = sorted({one.group for one in pairs})
    colours = {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}
    for one in pairs[:MOST_DOTS]:
        at = (1e3 * one.measured_s, 1e3 * one.predicted_s)
        out.append(axes.dot(*at, colours[one.group], f"{one.name} on {one.group}"))
    out += axes.frame("measured ms", "predicted ms")
    entries, used = legend(groups, list(colours.values()), TOP + HEIGHT + 50)
    return [Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))]

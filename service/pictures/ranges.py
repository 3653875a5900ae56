"""What a calibration set covered: the ranges of each linear's input, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from service.pictures.svg import COLOURS, Axes, Panel, legend, text

TOP, HEIGHT = 50.0, 130.0
SEEN, SMOOTHED, HELD_OUT = COLOURS[0], COLOURS[2], COLOURS[5]
_MAGNITUDE = Field(ge=0.0, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RangedEnds:
    """The largest magnitudes of an input's channels in five numbers, as `quantize --json` tells of them."""

    least: Annotated[float, _MAGNITUDE]
    lower: Annotated[float, _MAGNITUDE]
    median: Annotated[float, _MAGNITUDE]
    upper: Annotated[float, _MAGNITUDE]
    most: Annotated[float, _MAGNITUDE]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangedLinear:
    """A linear of one layer, and the ranges of its input."""

    layer: Annotated[int, Field(ge=0)]
    linear: str
    seen: RangedEnds | None = None
    smoothed: RangedEnds | None = None
    held_out: RangedEnds | None = None


def range_panels(linears: Sequence[RangedLinear], title: str) -> list[Panel]:
    """A panel for each kind of linear: its channels by layer, on the calibration set and on the held-out text."""
    panels = [Panel(30.0, (text(12, 20, title, bold=True),))]
    for name in dict.fromkeys(one.linear for one in linears):
        panels.append(_panel([one for one in linears if one.linear == name and one.seen is not None], name))
    names = ("calibration set: most, half of the channels, median", "the same, smoothed", "held-out text: most")
    entries, used = legend(names, (SEEN, SMOOTHED, HELD_OUT), 10.0)
    return [*panels, Panel(used + 20.0, tuple(entries))]


def _panel(linears: Sequence[RangedLinear], name: str) -> Panel:
    drawn = [
        (ends, colour)
        for ends, colour in ((_ends(linears, "seen"), SEEN), (_ends(linears, "smoothed"), SMOOTHED))
        if ends
    ]
    held_out = _ends(linears, "held_out")
    logs = [_log(value) for ends, _ in drawn for _, each in ends for value in (each.lower, each.most)]
    logs += [_log(each.most) for _, each in held_out]
    low, high = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)
    last = max(one.layer for one in linears)
    axes = Axes(x_range=(-0.5, last + 0.5), y_range=(low, max(high, low + 1)), top=TOP, height=HEIGHT)
    uncovered = sum(
        one.held_out is not None and one.seen is not None and one.held_out.most > one.seen.most for one in linears
    )
    words = f"Input of {name}" + (
        f": {uncovered} of {len(linears)} layers reach further on the held-out text" if held_out else ""
    )
    out = [text(12, 18, words), *axes.frame("layer", "largest magnitude of a channel", with_y=False)]
    for power in range(low, max(high, low + 1) + 1):
        _, y = axes.at(0.0, power)
        out += [
            f'<path class="axis" d="M{axes.left:.1f} {y:.1f}h-4"/>',
            text(axes.left - 8, y + 4, f"{10.0**power:g}", anchor="end"),
        ]
    for (ends, colour), shift in zip(drawn, (-0.12, 0.12), strict=False):
        for layer, each in ends:
            about = f"layer {layer}: {each.least:.3g} to {each.most:.3g}, median {each.median:.3g}"
            out.append(axes.line([(layer + shift, _log(each.lower)), (layer + shift, _log(each.upper))], colour, about))
            out += [axes.dot(layer + shift, _log(value), colour, about) for value in (each.median, each.most)]
    out += [
        axes.dot(layer, _log(each.most), HELD_OUT, f"layer {layer}, held out: {each.most:.3g}")
        for layer, each in held_out
    ]
    return Panel(TOP + HEIGHT + 48, tuple(out))


def _ends(linears: Sequence[RangedLinear], which: str) -> list[tuple[int, RangedEnds]]:
    return [(one.layer, ends) for one in linears if (ends := getattr(one, which)) is not None]


def _log(value: float) -> float:
    return math.log10(max(value, 1e-6))

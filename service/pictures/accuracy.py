"""Predicted against measured seconds of a run's rounds: a dot each, on the diagonal where the prediction was right."""

from __future__ import annotations

from collections.abc import Sequence

from db.rows.runs import RoundTime
from service.pictures.svg import COLOURS, Axes, Panel, legend, text

TOP, HEIGHT = 60.0, 320.0


def accuracy_panel(rounds: Sequence[RoundTime]) -> Panel | None:
    """Milliseconds of each round on each stage, a colour a stage; None where nothing was predicted."""
    known = [(one, one.predicted_s) for one in rounds if one.predicted_s is not None]
    if not known:
        return None
    most = 1.05e3 * max(max(told, one.finish_s - one.start_s) for one, told in known)
    axes = Axes(x_range=(0.0, most), y_range=(0.0, most), top=TOP, height=HEIGHT, right=70.0 + 1.6 * HEIGHT)
    ratios = sorted(told / max(one.finish_s - one.start_s, 1e-12) - 1.0 for one, told in known)
    middle = ratios[len(ratios) // 2]
    out = [text(12, 20, f"Predicted against measured: {len(known)} rounds, {middle:+.1%} in the median", bold=True)]
    out.append(axes.line([(0.0, 0.0), (most, most)], "#889", "as predicted"))
    stages = sorted({one.stage for one, _ in known})
    for one, told in known:
        x, y = axes.at(1e3 * (one.finish_s - one.start_s), 1e3 * told)
        colour = COLOURS[stages.index(one.stage) % len(COLOURS)]
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}" fill-opacity="0.7"/>')
    out += axes.frame("measured ms", "predicted ms")
    names = [f"stage {stage}" for stage in stages]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(stages))]
    entries, used = legend(names, colours, TOP + HEIGHT + 50)
    return Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))

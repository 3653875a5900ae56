"""The picture of a waterfall: from the chip's peak down to what was reached, predicted beside measured."""

from __future__ import annotations

from service.pictures.svg import WIDTH, Panel, box, document, text
from tuner.waterfall.steps import PEAK, Waterfall, to_rows

TOLD, MEASURED, IDEAL, SAVED = "#56B4E9", "#0072B2", "#009E73", "#BBBBBB"
LEFT, RIGHT, ROW, BAR = 290, 110, 34, 12


def drawing(planned: Waterfall | None, measured: Waterfall | None, title: str) -> str:
    """A row for each step, bars beginning where the step before ended; at least one waterfall is needed."""
    rows = to_rows(planned, measured)
    most = max(each.makespan_s for each in (planned, measured) if each is not None)
    scale = (WIDTH - LEFT - RIGHT) / (1.05 * most)
    out = [text(12, 24, title, bold=True)]
    x = 12.0
    for name, colour in (("at the chip's peak", IDEAL), ("predicted", TOLD), ("measured", MEASURED)):
        out += [box(x, 36, 12, 12, colour), text(x + 17, 47, name, kind="soft")]
        x += 40 + 8 * len(name)
    y, reached = 62, [0.0, 0.0]
    for name, *seconds in rows:
        out.append(text(LEFT - 8, y + 16, name, anchor="end"))
        for index, (value, colour) in enumerate(zip(seconds, (TOLD, MEASURED), strict=True)):
            if value is None:
                continue
            begin, reached[index] = reached[index], reached[index] + value
            left, right = sorted((begin, reached[index]))
            shown = IDEAL if name == PEAK else SAVED if value < 0 else colour
            top = y + index * (BAR + 2)
            out.append(box(LEFT + scale * left, top, max(scale * (right - left), 0.5), BAR, shown, f"{value:.4g} s"))
            out.append(text(LEFT + scale * right + 5, top + 10, f"{value:.4g} s", kind="soft"))
        y += ROW
    for index, each in enumerate((planned, measured)):
        if each is not None:
            top = y + index * (BAR + 2)
            out.append(box(LEFT, top, scale * each.makespan_s, BAR, (TOLD, MEASURED)[index]))
            out.append(text(LEFT + scale * each.makespan_s + 5, top + 10, f"{each.makespan_s:.4g} s"))
    out.append(text(LEFT - 8, y + 16, "makespan", anchor="end", bold=True))
    return document([Panel(y + ROW + 8, tuple(out))])

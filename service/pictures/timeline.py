"""The pipeline's timeline: a row a stage, a bar a round (in each group of layers), its chunks coloured by request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.pictures.svg import COLOURS, WIDTH, Axes, Panel, box, legend, text
from tuner.plan.plan import Plan, Round

ROW, GAP, TOP = 26.0, 6.0, 44.0
MOST_BARS = 6000
"""Bars that are drawn as they are; beyond, rounds too close to tell apart are drawn as one (`_merged`)."""
Stretch = tuple[float, float, int]
"""From where to where a round is drawn, and which it is."""
MOST_NAMED = 12
"""Requests with a colour of their own in the legend."""


@dataclass(frozen=True, slots=True)
class Bars:
    """When rounds run: (round, group of layers, start_s, finish_s) each."""

    title: str
    bars: Sequence[tuple[int, int, float, float]]
    end_s: float = 0.0
    """Where the axis ends at least, so that timelines below each other compare."""


def timeline_panel(plan: Plan, shown: Bars) -> Panel:
    """Rows of stages over time; grey is idle."""
    parallel = plan.parallel
    num_rows, stages = parallel.pp_size, parallel.stage_of_group
    own_end_s = max((finish for _, _, _, finish in shown.bars), default=0.0)
    end_s = max(shown.end_s, own_end_s)
    height = num_rows * (ROW + GAP)
    axes = Axes(x_range=(0.0, end_s), y_range=(0.0, 1.0), top=TOP, height=height, left=90.0)
    busy_s = sum(finish - start for _, _, start, finish in shown.bars)
    idle = max(0.0, 1.0 - busy_s / (own_end_s * num_rows)) if own_end_s else 0.0
    out = [text(12, 20, f"{shown.title}: {own_end_s:.4g} s, {idle:.1%} of it bubbles (grey)", bold=True)]
    for row in range(num_rows):
        y = TOP + row * (ROW + GAP)
        out += [
            text(82, y + ROW / 2 + 4, f"stage {row}", anchor="end"),
            f'<rect class="bubble" x="90" y="{y:.1f}" width="{WIDTH - 110}" height="{ROW}"/>',
        ]
    if sum(len(plan.rounds[index]) for index, *_ in shown.bars) > MOST_BARS:
        out += _merged(plan, shown, axes)
    else:
        for index, group, start, finish in shown.bars:
            x, _ = axes.at(start, 0.0)
            width = axes.at(finish, 0.0)[0] - x
            out += _bar(plan, index, x, TOP + stages[group] * (ROW + GAP), width, 1e3 * (finish - start))
    out += axes.frame("seconds", "", with_y=False)
    named = plan.requests[:MOST_NAMED]
    names = [f"{request.id} ({request.prompt_tokens})" for request in named]
    if len(plan.requests) > MOST_NAMED:
        names[-1] = f"and {len(plan.requests) - MOST_NAMED + 1} more, the colours again"
    entries, used = legend(names, [colour_of(i) for i in range(len(names))], TOP + height + 50, left=90.0)
    return Panel(TOP + height + 50 + used + 10, (*out, *entries))


def colour_of(request: int) -> str:
    """Of a request's chunks."""
    return COLOURS[request % len(COLOURS)]


def _bar(plan: Plan, index: int, x: float, y: float, width: float, ms: float) -> list[str]:
    """A round: its chunks on top of each other, as high as their shares of its tokens."""
    chunks: Round = plan.rounds[index]
    total = sum(chunk.tokens for chunk in chunks)
    scale, out = ROW / total, []
    width = max(width - min(0.6, 0.2 * width), 0.3)  # a hair between rounds
    for chunk in chunks:
        title = (
            f"round {index}, {total} tokens, {ms:.3g} ms: {plan.requests[chunk.request].id} "
            f"{chunk.start} to {chunk.end}"
        )
        out.append(box(x, y, width, scale * chunk.tokens, colour_of(chunk.request), title))
        y += scale * chunk.tokens
    return out


def _merged(plan: Plan, shown: Bars, axes: Axes) -> list[str]:
    """Bars of several rounds each, so long that about MOST_BARS are drawn. An idle time is drawn if it is longer than a
    quarter of that."""
    stages, rows = plan.parallel.stage_of_group, dict[int, list[Stretch]]()
    least = (axes.right - axes.left) * plan.parallel.pp_size / MOST_BARS
    for index, group, start, finish in shown.bars:
        rows.setdefault(stages[group], []).append((axes.at(start, 0.0)[0], axes.at(finish, 0.0)[0], index))
    return [
        _merged_bar(plan, together, TOP + row * (ROW + GAP))
        for row, stretches in rows.items()
        for together in _close(sorted(stretches), least)
    ]


def _close(stretches: Sequence[Stretch], least: float) -> Iterator[list[Stretch]]:
    """Neighbours that make a bar of at least so many units, or end where a longer idle time begins."""
    together: list[Stretch] = []
    for stretch in stretches:
        if together:
            (first, _, _), (_, last, _) = together[0], together[-1]
            if stretch[0] - last > least / 4 or last - first >= least:
                yield together
                together = []
        together.append(stretch)
    yield together


def _merged_bar(plan: Plan, together: Sequence[Stretch], y: float) -> str:
    """A bar in the colour of the request with most of its time."""
    time_of: dict[int, float] = {}
    for start, finish, index in together:
        chunks = plan.rounds[index]
        a_token = (finish - start) / sum(chunk.tokens for chunk in chunks)
        for chunk in chunks:
            time_of[chunk.request] = time_of.get(chunk.request, 0.0) + a_token * chunk.tokens
    most = max(time_of, key=lambda request: time_of[request])
    (left, _, first), (_, right, last) = together[0], together[-1]
    title = f"rounds {first} to {last}, most of {plan.requests[most].id}"
    return box(left, y, right - left, ROW, colour_of(most), title)

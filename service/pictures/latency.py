"""A trace under several policies: how TTFT is distributed, and what it is at each load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from service.pictures.svg import COLOURS, Axes, Panel, legend, text
from tuner.search.replay import Replay

TOP, HEIGHT = 60.0, 220.0


def ttft_panel(replays: Sequence[Replay], title: str) -> Panel:
    """The share of requests whose first token came within so many seconds, a line a policy."""
    ttft_s = [np.sort(np.asarray(replay.evaluation.ttft_s)) for replay in replays]
    most = float(np.median([times[int(0.99 * (len(times) - 1))] for times in ttft_s])) * 1.2
    axes = Axes(x_range=(0.0, max(most, 1e-9)), y_range=(0.0, 1.0), top=TOP, height=HEIGHT)
    out = [text(12, 20, f"TTFT by policy: {title}", bold=True)]
    for times, replay, colour in zip(ttft_s, replays, _colours(len(replays)), strict=True):
        share = np.arange(1, len(times) + 1) / len(times)
        inside = times <= most
        points = [(0.0, 0.0), *zip(times[inside].tolist(), share[inside].tolist(), strict=True)]
        out.append(axes.line(points, colour, replay.policy))
    out += axes.frame("seconds to the first token", "share of requests")
    names = [f"{one.policy}, mean {one.evaluation.mean_ttft_s:.3g} s" for one in replays]
    entries, used = legend(names, _colours(len(names)), TOP + HEIGHT + 50)
    return Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))


def load_panel(by_rate: Mapping[float, Sequence[Replay]]) -> Panel:
    """Tokens a second against the mean TTFT, a line a policy, a dot a rate."""
    policies = [one.policy for one in next(iter(by_rate.values()))]
    lines: dict[str, list[tuple[float, float]]] = {policy: [] for policy in policies}
    for replays in by_rate.values():
        for one in replays:
            if one.policy in lines:
                lines[one.policy].append((one.evaluation.mean_ttft_s, one.tokens_per_s / 1e3))
    least = min(min(x for x, _ in points) for points in lines.values() if points)
    most_x = max(min(max(x for x, _ in points) for points in lines.values() if points) * 4.0, 2.0 * least)
    most_y = 1.05 * max(y for points in lines.values() for _, y in points)
    axes = Axes(x_range=(0.0, most_x), y_range=(0.0, most_y), top=TOP, height=HEIGHT)
    rates = ", ".join(f"{rate:g}" for rate in by_rate)
    out = [text(12, 20, f"Throughput against mean TTFT, the trace at {rates} times its rate", bold=True)]
    for (policy, points), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        inside = [(x, y) for x, y in points if x <= most_x]
        if inside:
            out.append(axes.line(inside, colour, policy, dots=True))
    out += axes.frame("mean seconds to the first token", "thousand tokens a second")
    entries, used = legend(policies, _colours(len(policies)), TOP + HEIGHT + 50)
    return Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]

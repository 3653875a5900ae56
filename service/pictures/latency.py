"""A trace under several policies: how TTFT is distributed, and what it is at each load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from service.pictures.svg import LINE_COLOURS, Axes, Panel, legend, text
from tuner.replays.replay import Replay

TOP, HEIGHT = 60.0, 220.0


def ttft_panel(replays: Sequence[Replay], title: str) -> Panel:
    """The share of requests whose first token came within so many seconds, a line a policy."""
    ttft_s = [np.sort(np.asarray(replay.evaluation.ttft_s)) for replay in replays]
    most = float(np.median([times[int(0.99 * (len(times) - 1))] for times in ttft_s])) * 1.2
    axes = Axes(x_range=(0.0, max(most, 1e-9)), y_range=(0.0, 1.0), top=TOP, height=HEIGHT)
    out = [text(12, 20, f"TTFT by policy: {title}", bold=True)]
    for times, replay, colour in zip(ttft_s, replays, _colours([one.policy for one in replays]), strict=True):
        inside = times[times <= most]
        share = np.arange(len(inside) + 1) / len(times)
        at_s = [0.0, *np.repeat(inside, 2).tolist(), most]
        out.append(axes.line(zip(at_s, np.repeat(share, 2).tolist(), strict=True), colour, replay.policy))
    out += axes.frame("seconds to the first token", "share of requests")
    names = [f"{one.policy}, mean {one.evaluation.mean_ttft_s:.3g} s" for one in replays]
    entries, used = legend(names, _colours([one.policy for one in replays]), TOP + HEIGHT + 50)
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
    most_x = min(most_x, 1.05 * max(x for points in lines.values() for x, _ in points))
    most_y = 1.05 * max(y for points in lines.values() for _, y in points)
    axes = Axes(x_range=(0.0, most_x), y_range=(0.0, most_y), top=TOP, height=HEIGHT)
    rates = ", ".join(f"{rate:g}" for rate in by_rate)
    out = [text(12, 20, f"Throughput against mean TTFT, the trace at {rates} times its rate", bold=True)]
    for (policy, points), colour in zip(lines.items(), _colours(policies), strict=True):
        inside = [(x, y) for x, y in points if x <= most_x]
        if inside:
            out.append(axes.line(inside, colour, policy, dots=True))
    out += axes.frame("mean seconds to the first token", "thousand tokens a second")
    entries, used = legend(policies, _colours(policies), TOP + HEIGHT + 50)
    return Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))


def _colours(policies: Sequence[str]) -> list[str]:
    """A colour a policy; `joint` has the first."""
    others = [policy for policy in policies if policy != "joint"]
    place = {policy: 1 + index for index, policy in enumerate(others)} | {"joint": 0}
    return [LINE_COLOURS[place[policy] % len(LINE_COLOURS)] for policy in policies]

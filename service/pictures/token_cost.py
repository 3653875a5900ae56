"""What a token costs by its position in the prompt: why late chunks are shorter, and what a chunk's length changes."""

from __future__ import annotations

import numpy as np

from service.pictures.svg import COLOURS, Axes, Panel, legend, text
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan

NUM_POINTS = 80
CHUNKS = (512, 1024, 2048, 4096, 8192)
TOP, HEIGHT = 60.0, 200.0


def token_cost_panel(plan: Plan, cost: CostModel) -> Panel:
    """Microseconds a token on the slowest stage, in chunks of some lengths and as planned."""
    longest = max(request.prompt_tokens for request in plan.requests)
    stage = max(cost.merged().kinds, key=lambda kind: kind.seconds([(longest, 0, True)]))
    position = np.linspace(0.0, longest, NUM_POINTS)
    chunks = [chunk for chunk in CHUNKS if chunk <= longest] or [longest]
    curves = []
    for chunk in chunks:
        context = np.maximum(position - chunk, 0.0)
        own = stage.round_overhead_s + float(stage.tokens_s(chunk))
        curves.append(1e6 * (own + stage.chunk_seconds(np.full(NUM_POINTS, chunk), context)) / chunk)
    most = 1.05 * max(float(curve.max()) for curve in curves)
    axes = Axes(x_range=(0.0, float(longest)), y_range=(0.0, most), top=TOP, height=HEIGHT)
    out = [text(12, 20, "What a token costs by its position, on the slowest stage", bold=True)]
    for chunk, curve, colour in zip(chunks, curves, COLOURS, strict=False):
        out.append(axes.line(zip(position, curve, strict=True), colour, f"chunks of {chunk}"))
    alone = [chunks_of_round[0] for chunks_of_round in plan.rounds if len(chunks_of_round) == 1]
    for one in alone:
        seconds = stage.seconds([(one.tokens, one.start, False)])
        x, y = axes.at(one.end, min(1e6 * seconds / one.tokens, most))
        out.append(f'<circle class="soft" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>')
    out += axes.frame("tokens of the prompt up to the chunk's end", "us a token")
    names, colours = [f"chunks of {chunk}" for chunk in chunks], [*COLOURS[: len(chunks)]]
    if alone:
        names, colours = [*names, "dots: the plan's rounds of one chunk"], [*colours, "#667"]
    entries, used = legend(names, colours, TOP + HEIGHT + 50)
    return Panel(TOP + HEIGHT + 50 + used + 10, (*out, *entries))

"""The figure that an objective is about, in words, and what one plan gains over another in it."""

from __future__ import annotations

from tuner.plan.plan import WhatIf
from tuner.rounds.schedule import Evaluation
from tuner.workload.objective import Objective

NAMES = {
    Objective.MAKESPAN: "makespan",
    Objective.MEAN_TTFT: "mean TTFT",
    Objective.P99_TTFT: "p99 TTFT",
    Objective.SLA: "deadlines met",
    Objective.LATENESS: "lateness",
}
NO_GAIN = 0.005
"""A smaller share is no gain that anyone would notice."""


def figure_in_words(objective: Objective, sought: float) -> str:
    """The figure with its unit."""
    if objective is Objective.SLA:
        return f"{sought:.1%} of the deadlines met"
    if objective is Objective.LATENESS:
        return f"the latest {abs(sought):.4g} s {'after' if sought > 0.0 else 'before'} its deadline"
    return f"{sought:.4g} s"


def factor_over(objective: Objective, ours: float, theirs: float) -> float | None:
    """How many times as long another plan's seconds are; None where seconds are not what counts."""
    return None if objective.needs_deadlines or not ours else theirs / ours


def move_in_words(objective: Objective, base: Evaluation, move: WhatIf) -> str:
    """What a change would bring."""
    if objective is Objective.MAKESPAN or move.sought is None:
        return f"{move.change}, {1.0 - move.makespan_s / base.makespan_s:.1%} less"
    before = base.sought(objective)
    if objective.needs_deadlines:
        return f"{move.change}: {figure_in_words(objective, move.sought)}, not {figure_in_words(objective, before)}"
    return f"{move.change}, {1.0 - move.sought / before:.1%} less {NAMES[objective]}"


def one_card_in_words(objective: Objective, ours: float, theirs: Evaluation) -> str:
    """What the plan gains over one card alone."""
    other = theirs.sought(objective)
    factor = factor_over(objective, ours, other)
    if factor is None:
        return f"{figure_in_words(objective, ours)}; on one card {figure_in_words(objective, other)}"
    of = "" if objective is Objective.MAKESPAN else f", by {NAMES[objective]}"
    return f"{factor:.2f} times as fast as one card{of} ({other:.4g} s)"


def simple_in_words(
    objective: Objective, ours: Evaluation, measured: float | None, theirs: Evaluation, name: str
) -> str:
    """What the plan gains over the best simple setting; `measured` stands for what was predicted of ours."""
    mine = ours.sought(objective) if measured is None else measured
    other = theirs.sought(objective)
    factor = factor_over(objective, mine, other)
    figure = figure_in_words(objective, other)
    if factor is not None:
        of = "" if objective is Objective.MAKESPAN else f" by {NAMES[objective]}"
        if factor - 1.0 > NO_GAIN:
            return f"{factor - 1.0:.1%} over the best simple setting{of}, {name} ({figure})"
        longer = theirs.makespan_s / ours.makespan_s - 1.0
        if 1.0 - factor > NO_GAIN and longer > NO_GAIN:
            less = f"{1.0 - factor:.1%} less {NAMES[objective]}"
            return f"{name} has {less} ({figure}), but takes {longer:.1%} longer for all"
        return f"nothing over the simple setting{of}, {name} ({figure}): take that"
    if objective is Objective.LATENESS and other - mine > NO_GAIN * ours.makespan_s:
        return f"{other - mine:.4g} s over the best simple setting, {name} ({figure})"
    if objective is Objective.SLA and mine > other:
        return f"over the best simple setting, {name}, which has {figure}"
    if objective is Objective.SLA and theirs.mean_ttft_s > (1.0 + NO_GAIN) * ours.mean_ttft_s:
        more = theirs.mean_ttft_s / ours.mean_ttft_s - 1.0
        return f"as many deadlines met as by the best simple setting, {name}, whose mean TTFT is {more:.1%} longer"
    return f"nothing over the simple setting {name} ({figure}): take that"

"""Baselines of a plan: one card alone, and the best of the simple settings that users commonly choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from db.errors import UserError
from profiler.sequence.kind import SPKind
from tuner.fit.whole.costs import Costs
from tuner.plan.layout import Layout
from tuner.rounds.problem import arrive_over_time
from tuner.rounds.round_plan import Alternative
from tuner.search.layouts import Candidate, search_layouts, with_rounds
from tuner.search.partition import even_partition
from tuner.search.rules import Rules
from tuner.search.target import Target

ONE_CARD = Layout(tp_size=1, pp_size=1)


def one_card(target: Target, rules: Rules, fit_layout: Callable[[Layout], Costs]) -> Alternative:
    """One card alone, its rounds by the same rules; a partition that is kept is that of several."""
    try:
        (found,) = search_layouts(replace(target, layer_partition=None), [ONE_CARD], rules, fit_layout)
    except UserError as error:
        return Alternative(layout=ONE_CARD, refusal=str(error))
    return Alternative(layout=ONE_CARD, rounds=None if found.refusal else found.rounds, refusal=found.refusal)


def best_simple(target: Target, candidates: Sequence[Candidate], rules: Rules) -> Alternative | None:
    """The best of tensor- and pipeline-parallel layouts on even layers, with the best equal chunks.

    None where none can run, and for requests that arrive over time, whose policies are replayed instead.
    """
    requests = target.requests
    if arrive_over_time(requests):
        return None
    found = []
    for candidate in candidates:
        layout = candidate.layout
        plain = layout.sp_size == 1 and layout.sp_kind is SPKind.NONE and layout.virtual_stages == 1
        if not plain or candidate.refusal or candidate.costs is None:
            continue
        even = replace(candidate, layer_partition=even_partition(target.shape.num_layers, layout.pp_size))
        own = candidate.rules(rules)
        made = with_rounds(
            target, even, own.baseline(even.layout_costs.cost_model(even.layer_partition), requests), own
        )
        if made.rounds is not None and not made.refusal:
            found.append(Alternative(layout=layout, rounds=made.rounds))
    return min(found, key=lambda one: one.rounds.evaluation.score(rules.objective) if one.rounds else (), default=None)

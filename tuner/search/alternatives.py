"""What a plan is compared with: one card alone, and the best of the simple settings that people type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from db.errors import UserError
from profiler.sequence.kind import SPKind
from tuner.fit.layer_costs import LayerCosts
from tuner.plan.layout import Layout
from tuner.rounds.problem import arrive_over_time
from tuner.rounds.round_plan import Alternative
from tuner.search.layouts import Candidate, Target, least_memory_refusal, search_layouts
from tuner.search.partition import even_partition
from tuner.search.rules import Rules

ONE_CARD = Layout(tp_size=1, pp_size=1)


def one_card(target: Target, rules: Rules, fit_layout: Callable[[Layout], LayerCosts]) -> Alternative:
    """One card alone, its rounds by the same rules."""
    refusal = least_memory_refusal(target, ONE_CARD)
    if refusal:
        return Alternative(layout=ONE_CARD, refusal=refusal)
    try:
        (found,) = search_layouts(target, [ONE_CARD], rules, fit_layout)
    except UserError as error:
        return Alternative(layout=ONE_CARD, refusal=str(error))
    return Alternative(layout=ONE_CARD, rounds=None if found.refusal else found.rounds, refusal=found.refusal)


def best_simple(target: Target, candidates: Sequence[Candidate], rules: Rules) -> Alternative | None:
    """The best of tensor- and pipeline-parallel layouts on even layers, with the best equal chunks.

    None where none can run, and for requests that arrive over time, whose policies are replayed instead.
    """
    if arrive_over_time(target.requests):
        return None
    found = []
    for candidate in candidates:
        layout = candidate.layout
        plain = layout.sp_size == 1 and layout.sp_kind is SPKind.NONE and layout.virtual_stages == 1
        if not plain or candidate.refusal or candidate.costs is None:
            continue
        partition = even_partition(target.shape.num_layers, layout.pp_size)
        rounds = rules.baseline(candidate.costs.cost_model(partition), target.requests)
        found.append(Alternative(layout=layout, rounds=rounds))
    return min(found, key=lambda one: one.rounds.evaluation.score(rules.objective) if one.rounds else (), default=None)

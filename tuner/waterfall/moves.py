"""Which improvement would bring most: the same requests planned again with one thing made better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tuner.fit.curve import Curve
from tuner.fit.whole.costs import Costs, WholeCosts
from tuner.plan.plan import WhatIf
from tuner.rounds.problem import NO_LIMITS, arrive_over_time
from tuner.rounds.schedule import Evaluation, evaluate
from tuner.search.layouts import Candidate
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.workload.objective import Objective

QUICKER = 0.1
LINKS_FACTOR = 2.0
LEAST_GAIN = 2e-3  # shares of the figure sought, or of the makespan, below it are no move
ATTENTION, PRODUCTS, ELEMENTWISE = (
    f"{kind} {100 * QUICKER:.0f} % quicker" for kind in ("attention", "products", "element-wise work")
)
LAUNCHES = "launches of no time"
KERNELS = frozenset({ATTENTION, PRODUCTS, ELEMENTWISE, LAUNCHES})
"""What only other kernels change."""


def moves(
    target: Target,
    candidate: Candidate,
    rules: Rules,
    *,
    rivals: list[Candidate] | None = None,
    precisions: Mapping[str, Costs] | None = None,
) -> tuple[WhatIf, ...]:
    """What would make the figure that the plan is made for least; of requests that arrive over time nothing.

    First what the one who runs it can change, then what faster kernels would bring, each by its gain.
    rivals: other layouts that were planned; precisions: costs of the same layout in other precisions that were
    measured.
    """
    if arrive_over_time(target.requests) or candidate.rounds is None or candidate.costs is None:
        return ()
    objective, base = rules.objective, candidate.rounds.evaluation
    found = [
        (change, _planned(target, candidate, costs, its_rules))
        for change, costs, its_rules in _changes(candidate, rules, precisions or {})
    ]
    others = [one for one in rivals or () if one.rounds is not None and not one.refusal]
    if others:
        best = min(others, key=lambda one: one.score(objective))
        assert best.rounds is not None
        found.append((f"the layout {best.layout}", best.rounds.evaluation))
    gains = [(change, made) for change, made in found if _is_move(objective, base, made)]
    gains.sort(key=lambda gain: (gain[0] in KERNELS, *gain[1].score(objective)))
    return tuple(
        WhatIf(
            change=change,
            makespan_s=made.makespan_s,
            sought=None if objective is Objective.MAKESPAN else made.sought(objective),
        )
        for change, made in gains
    )


def _is_move(objective: Objective, base: Evaluation, made: Evaluation) -> bool:
    """Whether the change brings anything in what is sought."""
    if objective is Objective.SLA:
        return made.sla_weight > base.sla_weight
    before_s, after_s = base.sought(objective), made.sought(objective)
    return before_s - after_s > LEAST_GAIN * (base.makespan_s if objective is Objective.LATENESS else before_s)


def _changes(candidate: Candidate, rules: Rules, precisions: Mapping[str, Costs]) -> Iterator[tuple[str, Costs, Rules]]:
    costs, layout = candidate.layout_costs, candidate.layout
    own = candidate.rules(rules)
    if not isinstance(costs, WholeCosts):  # parts of layers were measured
        correction = costs.correction
        quick_attention = replace(correction, attention_scale=(1.0 - QUICKER) * correction.attention_scale)
        yield ATTENTION, replace(costs, correction=quick_attention), own
        quick_products = costs.changed(
            lambda kind: replace(kind, projections=tuple(map(_quicker, kind.projections)))
        )  # fmt: skip
        yield PRODUCTS, quick_products, own
        yield ELEMENTWISE, costs.changed(lambda kind: replace(kind, elementwise=_quicker(kind.elementwise))), own
        yield LAUNCHES, replace(costs, round_overhead_s=0.0, chunk_s=0.0), own
    if layout.world_size > 1:
        yield f"links {LINKS_FACTOR:g} times as fast", costs.with_links(LINKS_FACTOR), own
    if own.window is not None:
        yield "no window", costs, replace(own, window=None)
    if own.limits != NO_LIMITS:
        yield "longer rounds (more memory, no limits)", costs, replace(own, limits=NO_LIMITS)
    for name, others in precisions.items():
        yield f"--dtype {name}", others.interleaved(layout.virtual_stages, layout.stage_order), own


def _planned(target: Target, candidate: Candidate, costs: Costs, rules: Rules) -> Evaluation:
    """The better of the plan's rounds and of a new draft, under other costs."""
    assert candidate.rounds is not None
    model = costs.cost_model(candidate.layer_partition)
    kept = evaluate(model, target.requests, candidate.rounds.rounds, rules.window)
    drafted = rules.draft(model, target.requests).evaluation
    return min(kept, drafted, key=lambda each: each.score(rules.objective))


def _quicker(curve: Curve) -> Curve:
    return replace(curve, seconds=(1.0 - QUICKER) * curve.seconds)

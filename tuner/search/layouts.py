"""The search over layouts: for each, the best partition and rounds or the reason why it is refused; then a ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from db.errors import UserError
from profiler.model import ModelShape
from tuner.fit.holdout import HeldOutError
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.uncertainty import makespan_uncertainty
from tuner.plan.layout import Layout
from tuner.plan.memory import RankMemory, memory_refusal, rounds_memory
from tuner.plan.plan import Parallel, Plan, Request
from tuner.rounds.round_plan import RoundPlan, rounds_to_plan
from tuner.rounds.schedule import Objective
from tuner.search.partition import choose_partition
from tuner.search.rules import Rules

NEAR = 1.03
"""Layouts whose drafts are within this factor of the best one's are planned in full: that gains a few percent."""
FitLayout = Callable[[Layout], LayerCosts]  # raises UserError when nothing was measured for the layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is planned: the model in a precision, the requests, and the device they run on."""

    shape: ModelShape
    dtype: str
    requests: tuple[Request, ...]
    device_type: str
    memory_bytes: int
    max_new_tokens: int = 1
    threads_per_rank: int | None = None

    def __post_init__(self) -> None:
        for request in self.requests:
            most = self.shape.max_positions - self.max_new_tokens + 1
            if request.prompt_tokens > most:
                allowed = f"at most {most} with {self.max_new_tokens} new tokens, by the positions of {self.shape.name}"
                raise UserError(f"prompt_tokens of request {request.id}", request.prompt_tokens, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout with its best plan, or with the reason why there is none."""

    layout: Layout
    refusal: str | None = None
    costs: LayerCosts | None = None
    layer_partition: tuple[int, ...] = ()
    rounds: RoundPlan | None = None
    memory: tuple[RankMemory, ...] = ()

    @property
    def peak_memory_bytes(self) -> int:
        """Of the rank that needs most."""
        return max((stage.total_bytes for stage in self.memory), default=0)

    @property
    def extrapolates(self) -> bool:
        """Whether a chunk or a context of the plan is larger than any that was measured."""
        if self.costs is None or self.rounds is None:
            return False
        largest = max(sum(chunk.tokens for chunk in chunks) for chunks in self.rounds.rounds)
        longest = max(chunk.end for chunks in self.rounds.rounds for chunk in chunks)
        return largest > self.costs.max_chunk or longest > self.costs.max_context

    def uncertainty(self, held_out: Sequence[HeldOutError]) -> float:
        """How far the prediction of the makespan may be off, as a share of it."""
        assert self.costs is not None
        return makespan_uncertainty(held_out, self.costs.correction, extrapolates=self.extrapolates)

    def score(self, objective: Objective) -> tuple[float, ...]:
        """What to minimise; refused layouts come after all others."""
        if self.refusal or self.rounds is None:
            return (math.inf,)
        return self.rounds.evaluation.score(objective)

    def is_near(self, best: tuple[float, ...], objective: Objective) -> bool:
        """Whether a full plan of this layout could be better than the best draft."""
        score = self.score(objective)
        return math.isfinite(score[0]) and (objective is Objective.SLA or score[0] <= NEAR * best[0])


def search_layouts(target: Target, layouts: Sequence[Layout], rules: Rules, fit_layout: FitLayout) -> list[Candidate]:
    """Plan every layout; the best by the objective first, refused ones last.

    All are drafted; those that a full plan could bring to the front are planned in full.
    """
    drafts = [_draft(target, layout, rules, fit_layout) for layout in layouts]
    best = min((draft.score(rules.objective) for draft in drafts), default=())
    candidates = [_planned(target, draft, rules) if draft.is_near(best, rules.objective) else draft for draft in drafts]
    return sorted(candidates, key=lambda candidate: candidate.score(rules.objective))


def to_plan(target: Target, candidate: Candidate, rules: Rules, *, uncertainty: float | None = None) -> Plan:
    """The plan file's content for a candidate that was not refused."""
    assert candidate.rounds is not None and candidate.costs is not None
    layout = candidate.layout
    return rounds_to_plan(
        candidate.rounds,
        requests=target.requests,
        model=dict(target.shape.config) | {"name": target.shape.name},
        precision=target.dtype,
        parallel=_parallel(layout, candidate.layer_partition),
        window=rules.window,
        threads_per_rank=target.threads_per_rank,
        cost_model=candidate.costs.cost_model(candidate.layer_partition).to_json(),
        uncertainty=uncertainty,
    )


def _parallel(layout: Layout, layer_partition: tuple[int, ...]) -> Parallel:
    return Parallel(
        tp_size=layout.tp_size,
        pp_size=layout.pp_size,
        layer_partition=layer_partition,
        sp_size=layout.sp_size,
        sp_kind=layout.sp_kind,
        virtual_stages=layout.virtual_stages,
        stage_order=layout.stage_order,
        weights=layout.weights,
    )


def _draft(target: Target, layout: Layout, rules: Rules, fit_layout: FitLayout) -> Candidate:
    if layout.refusal:
        return Candidate(layout=layout, refusal=layout.refusal)
    try:
        costs = fit_layout(layout)
    except UserError as error:
        return Candidate(layout=layout, refusal=str(error))
    partition, rounds = choose_partition(
        costs.cost_model, target.shape.num_layers, layout.pp_size, target.requests, rules
    )
    return _with_rounds(target, Candidate(layout=layout, costs=costs, layer_partition=partition), rounds)


def _planned(target: Target, draft: Candidate, rules: Rules) -> Candidate:
    assert draft.costs is not None
    return _with_rounds(target, draft, rules.plan(draft.costs.cost_model(draft.layer_partition), target.requests))


def _with_rounds(target: Target, candidate: Candidate, rounds: RoundPlan) -> Candidate:
    """The candidate with its rounds, and refused if they do not fit into memory."""
    layout = candidate.layout
    memory = rounds_memory(
        target.shape,
        _parallel(layout, candidate.layer_partition),
        target.requests,
        rounds.rounds,
        dtype=target.dtype,
        max_new_tokens=target.max_new_tokens,
        device_type=target.device_type,
    )
    refusal = memory_refusal(
        memory,
        stage_size=layout.sp_size * layout.tp_size,
        device_type=target.device_type,
        memory_bytes=target.memory_bytes,
    )
    return replace(candidate, rounds=rounds, memory=memory, refusal=refusal)

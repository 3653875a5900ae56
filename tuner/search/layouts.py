"""The search over layouts by branch and bound: the best partition and rounds of each that could still be the best."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from db.errors import UserError
from profiler.sequence.kind import CUTS, SequenceCut, SPKind
from tuner.fit.attention.kernels import with_kernels
from tuner.fit.holdout import HeldOutError
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.uncertainty import makespan_uncertainty
from tuner.fit.whole.costs import Costs
from tuner.plan.cost_model import CostModel
from tuner.plan.layout import Layout
from tuner.plan.memory import RankMemory, rounds_memory
from tuner.plan.plan import Plan
from tuner.plan.stage_order import StageOrder
from tuner.rounds.problem import Limits, Problem, arrive_over_time
from tuner.rounds.round_plan import Bound, RoundPlan, rounds_to_plan
from tuner.search.cuts import with_cuts
from tuner.search.floors import Batch, Floors, LayoutFloor
from tuner.search.links import Assumed
from tuner.search.partition import BuildCost, balanced_partition, choose_partition, even_partition
from tuner.search.rules import Rules
from tuner.search.target import Room, Target, least_memory_refusal, parallel_of, with_gathered_weights
from tuner.workload.objective import Objective

NEAR_SKETCH, NEAR_DRAFT = 1.025, 1.015
"""Layouts whose sketches are within this factor of the best are drafted, since other partitions gain a few percent;
those whose drafts are within the other one are planned in full, which gains less."""
NEAR_ESTIMATE, NEAR_FAMILY = 1.025, 1.1
"""Layouts whose estimates are within this factor of the best sketch are sketched, too: sketches are hardly ever below
their estimates. The other factor is for the first of each family, which is told of as a rival."""
MOST_DRAFTS, MOST_PLANS = 3, 2
"""How many are drafted at most, and how many of these are planned in full."""
NEAR_LIMIT = 0.9  # of the largest round that fits: a plan's largest above it might be larger
SKETCHED_ROUNDS, HOPEFUL = 4, 1.05
"""Numbers of rounds that are tried where stages hold several groups; one where the estimate is above the best sketch
by more than the factor."""
FitLayout = Callable[[Layout], Costs]  # raises UserError when nothing was measured for the layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout with its best plan, or with the reason why there is none: refused, or proven or estimated worse."""

    layout: Layout
    refusal: str | None = None
    floor: tuple[float, ...] | None = None
    """A bound on the score of all its plans; where it was left out without an estimate, no better than the best."""
    likely: tuple[float, ...] | None = None
    """An estimate of its score, clearly above the best one: what it was left out for."""
    costs: Costs | None = None
    layer_partition: tuple[int, ...] = ()
    rounds: RoundPlan | None = None
    cuts: tuple[SequenceCut, ...] = ()
    """How each round is cut among the ranks that share its rows."""
    memory: tuple[RankMemory, ...] = ()
    limits: Limits | None = None
    """Of rounds, where memory sets them."""
    assumed: tuple[Assumed, ...] = ()
    """Messages whose times no rows tell."""
    alike: tuple[str, ...] = ()
    """In words, what was measured elsewhere and is taken to be alike."""

    @property
    def layout_costs(self) -> Costs:
        """The costs with the layout's groups of layers; `costs` are shared by layouts of the same work."""
        assert self.costs is not None
        return self.costs.interleaved(self.layout.virtual_stages, self.layout.stage_order)

    def rules(self, rules: Rules) -> Rules:
        """The rules within what memory allows this layout."""
        return rules if self.limits is None else replace(rules, limits=self.limits)

    @property
    def is_proven_worse(self) -> bool:
        """Whether it was left out without being planned: no plan of it is better than the best one."""
        return self.rounds is None and self.refusal is None and self.likely is None

    @property
    def is_estimated_worse(self) -> bool:
        """Whether it was left out without being planned, and without a proof."""
        return self.rounds is None and self.refusal is None and self.likely is not None

    @property
    def peak_memory_bytes(self) -> int:
        """Of the rank that needs most."""
        return max((stage.total_bytes for stage in self.memory), default=0)

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether rounds might be larger, or more prompts held at once, if there was more memory."""
        if self.limits is None or self.rounds is None or self.limits.max_round_tokens is None:
            return False
        largest = max(sum(chunk.tokens for chunk in chunks) for chunks in self.rounds.rounds)
        return self.limits.max_kv_tokens is not None or largest > NEAR_LIMIT * self.limits.max_round_tokens

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
        guessed = self.extrapolates or bool(self.assumed or self.alike) or not self.is_near_layers
        return makespan_uncertainty(held_out, self.costs.correction, extrapolates=guessed)

    @property
    def is_near_layers(self) -> bool:
        """Whether whole layers were measured with about as many tokens as the rounds that take most of the time have.

        Without any measured layer the parts alone tell.
        """
        if not isinstance(self.costs, LayerCosts) or self.rounds is None:
            return True
        calibration = self.costs.calibration
        if not calibration.num_layers_measured:
            return True
        tokens = np.array([sum(chunk.tokens for chunk in chunks) for chunks in self.rounds.rounds])
        seconds = self.rounds.evaluation.round_s.sum(axis=1)
        rows = np.maximum(tokens / self.layout.sp_size, 1.0)
        near = np.array([calibration.is_near(each) for each in rows.tolist()])
        return bool(seconds[near].sum() >= 0.5 * seconds.sum())

    def score(self, objective: Objective) -> tuple[float, ...]:
        """What to minimise; refused layouts come after all others."""
        if self.refusal or self.rounds is None:
            return (math.inf,)
        return self.rounds.evaluation.score(objective)

    def is_near(self, best: tuple[float, ...], objective: Objective, factor: float) -> bool:
        """Whether its score is within a factor of the best one; deadlines that are met have no factors."""
        score = self.score(objective)
        return math.isfinite(score[0]) and (objective.needs_deadlines or score[0] <= factor * best[0])


def search_layouts(
    target: Target, layouts: Sequence[Layout], rules: Rules, fit_layout: FitLayout, *, every: bool = False
) -> list[Candidate]:
    """The layouts, the best by the objective first, then those left out, refused ones last.

    Branch and bound: layouts are visited by an estimate of their score. One that could not reach what the best
    sketch so far does is *proven* worse by its floor (`search.floors`); one whose estimate is clearly above that sketch
    is *estimated* worse. Neither is planned. All others are sketched on one partition. A sketch is a plan, so that no
    plan of those proven worse is better than the best. The best sketches are drafted, with the partition chosen along
    with the rounds, and the best drafts are planned in full.

    every: sketch all of them.
    """
    needs_room: dict[Layout, str | None] = {}

    def memory_refusal_of(layout: Layout) -> str | None:
        """The same for all that differ in their groups of layers alone."""
        plain = replace(layout, virtual_stages=1, stage_order=StageOrder.LOOP)
        if plain not in needs_room:
            needs_room[plain] = least_memory_refusal(target, plain, rules.limits, rules.chunk_multiple)
        return needs_room[plain]

    def fitted(layout: Layout) -> Candidate:
        return _fitted(layout, memory_refusal_of, fit_layout)

    candidates, objective = list(map(fitted, layouts)), rules.objective
    batch = Batch.of(target.requests, rules.limits.max_round_tokens, rules.chunk_multiple)
    floors = Floors(batch, target.shape.num_layers)
    waiting: list[tuple[tuple[float, ...], bool, int]] = []
    has_estimate = not arrive_over_time(target.requests)
    families: set[str] = set()
    best: tuple[float, ...] = (math.inf,)

    def floor_of(candidate: Candidate) -> LayoutFloor:
        assert candidate.costs is not None
        return floors.of(candidate.layout, candidate.costs)

    def wait(index: int) -> None:
        floor = floor_of(candidates[index])
        likely = floor.likely_score(objective) if has_estimate else floor.score(objective, close=False)
        # V order, of the same estimate as a loop, usually comes out better.
        heapq.heappush(waiting, (likely, candidates[index].layout.stage_order is StageOrder.LOOP, index))

    def left_out(candidate: Candidate) -> Candidate | None:
        """With the reason why it need not be sketched; None where it has to be."""
        floor = floor_of(candidate)
        for close in (False, True):
            if (score := floor.score(objective, close=close)) >= best:
                return replace(candidate, floor=score)
        if not has_estimate:
            return None
        most_tokens = candidate.limits.max_round_tokens if candidate.limits else None
        near = NEAR_ESTIMATE if candidate.layout.family in families else NEAR_FAMILY
        if floor.likely_score(objective, most_tokens, near) <= best:
            return None
        return replace(candidate, likely=floor.likely_score(objective, most_tokens))

    for index, candidate in enumerate(candidates):
        if candidate.costs is not None:
            wait(index)
    while waiting:
        *_, index = heapq.heappop(waiting)
        if not every and (known := left_out(candidates[index])):
            candidates[index] = known
            continue
        candidates[index] = roomy = _with_room(target, candidates[index], rules)
        if not every and roomy.limits is not None and (known := left_out(roomy)):
            candidates[index] = known
            continue
        if roomy.refusal is None:
            roomy = replace(roomy, floor=floor_of(roomy).score(objective, close=True))
            candidates[index] = roomy = _sketched(target, roomy, rules, best)
            best = min(best, roomy.score(objective))
            families.add(roomy.layout.family)
        if roomy.refusal and (layout := with_gathered_weights(roomy.layout)):
            candidates[index] = shared = fitted(layout)
            if shared.costs is not None:
                wait(index)
    return _improved(target, candidates, rules)


def _improved(target: Target, candidates: list[Candidate], rules: Rules) -> list[Candidate]:
    """The candidates ranked, the best few of them drafted and planned in full."""

    def score(candidate: Candidate) -> tuple[float, ...]:
        """Those left out come after those planned: first by their estimates, then by their floors."""
        if candidate.likely is not None and candidate.rounds is None:
            return (math.inf, -math.inf, *candidate.likely)
        return (*candidate.score(rules.objective), *(candidate.floor or ()))

    for step, most, near_factor in ((_drafted, MOST_DRAFTS, NEAR_SKETCH), (_planned, MOST_PLANS, NEAR_DRAFT)):
        candidates = sorted(candidates, key=score)
        best = candidates[0].score(rules.objective)
        near = [candidate for candidate in candidates[:most] if candidate.is_near(best, rules.objective, near_factor)]
        candidates[: len(near)] = [step(target, candidate, rules) for candidate in near]
    return sorted(candidates, key=lambda candidate: (candidate.refusal is not None, *score(candidate)))


def to_plan(target: Target, candidate: Candidate, rules: Rules, *, uncertainty: float | None = None) -> Plan:
    """The plan file's content for a candidate that was not refused."""
    assert candidate.rounds is not None and candidate.costs is not None
    layout = candidate.layout
    plan = rounds_to_plan(
        candidate.rounds,
        requests=target.requests,
        model=dict(target.shape.config) | {"name": target.shape.name, "backend": str(target.shape.backend)},
        precision=target.dtype,
        parallel=parallel_of(layout, candidate.layer_partition),
        window=rules.window,
        threads_per_rank=target.threads_per_rank,
        cost_model=candidate.layout_costs.cost_model(candidate.layer_partition).to_json(),
        cuts=candidate.cuts if layout.sp_kind is not SPKind.NONE else (),
        tuned_for=rules.tuned_for(target.requests),
        uncertainty=uncertainty,
    )
    costs = candidate.costs
    return with_kernels(plan, costs.kernels) if isinstance(costs, LayerCosts) else plan


def _fitted(layout: Layout, memory_refusal_of: Callable[[Layout], str | None], fit_layout: FitLayout) -> Candidate:
    """The layout with its costs, or the reason why it cannot run whatever the rounds.

    Weights that do not fit whole are gathered where ranks share them.
    """
    refusal = layout.refusal or memory_refusal_of(layout)
    if refusal and not layout.refusal and (shared := with_gathered_weights(layout)):
        return _fitted(shared, memory_refusal_of, fit_layout)
    if refusal:
        return Candidate(layout=layout, refusal=refusal)
    try:
        costs = fit_layout(layout)
    except UserError as error:
        return Candidate(layout=layout, refusal=str(error))
    return Candidate(layout=layout, costs=costs)


def _build_cost(candidate: Candidate) -> BuildCost:
    """The cost models of the layout's partitions, each built once."""
    return cache(candidate.layout_costs.cost_model)


def _with_room(target: Target, candidate: Candidate, rules: Rules) -> Candidate:
    """The layout with the partition that it is sketched for, that of least work on the fullest stage, and with rounds
    as large as memory allows; refused where there is no room for any."""
    build_cost, layout = _build_cost(candidate), candidate.layout
    if layout.virtual_stages == 1:
        partition = target.layer_partition or balanced_partition(
            build_cost, target.shape.num_layers, layout.pp_size, target.requests
        )
    else:
        partition = target.layer_partition or even_partition(target.shape.num_layers, layout.num_groups)
    candidate = replace(candidate, layer_partition=partition)
    room = _room(target, candidate, rules)
    limits = room.limits(rules.limits)
    if limits is None:
        return replace(candidate, refusal=room.refusal(rules.limits))
    return replace(candidate, limits=None if limits == rules.limits else limits)


def _room(target: Target, candidate: Candidate, rules: Rules) -> Room:
    assert candidate.costs is not None
    return Room(
        target=target, layout=candidate.layout, layer_partition=candidate.layer_partition,
        chunk_multiple=rules.chunk_multiple, measured_tokens=candidate.costs.max_chunk,
    )  # fmt: skip


def _sketched(target: Target, candidate: Candidate, rules: Rules, best: tuple[float, ...]) -> Candidate:
    """Drafted for its one partition, where memory asks for it in each way to share that.

    best: the score of the best sketch so far; one that is likely to be far off is made with less care.
    """
    room = _room(target, candidate, rules)
    choices = [candidate.limits] if candidate.limits is None else room.choices(rules.limits)
    sketches = [_within(target, replace(candidate, limits=limits), rules, room, best) for limits in choices]
    return min(sketches, key=lambda sketch: sketch.score(rules.objective))


def _within(target: Target, candidate: Candidate, rules: Rules, room: Room, best: tuple[float, ...]) -> Candidate:
    """The candidate with rounds within its limits, or within tighter ones where they still took too much memory."""
    layout = candidate.layout
    cost = _build_cost(candidate)(candidate.layer_partition)
    while True:
        bounded = candidate.rules(rules)
        if layout.virtual_stages == 1:
            rounds = bounded.draft(cost, target.requests)
        else:
            hopeful_s = HOPEFUL * best[0] if rules.objective is Objective.MAKESPAN else math.inf
            rounds = bounded.sketch(cost, _shorter(cost), target.requests, SKETCHED_ROUNDS, hopeful_s)
        sketched = with_rounds(target, candidate, rounds, rules)
        tighter = None if sketched.refusal is None else room.tighter(bounded.limits, rules.limits)
        if tighter is None:
            return sketched
        candidate = replace(candidate, limits=tighter)


def _shorter(cost: CostModel) -> CostModel:
    """A pipeline of one group a stage that fills and drains about as quickly as one of several: fewer stages.

    Its rounds are near the best for the other, whose schedules take far longer to judge.
    """
    held = cost.merged().stages
    fullest = max(held, key=lambda stage: float(stage.tokens_s(stage.token_count[-1])))
    num_stages = 1 + -(-(cost.pp_size - 1) // cost.virtual_stages)
    return replace(cost, stages=(fullest,) * num_stages, virtual_stages=1)


def _drafted(target: Target, candidate: Candidate, rules: Rules) -> Candidate:
    """Drafted for partitions around the best, chosen along with the rounds; as it is where none is better."""
    build_cost, layout, sketch = _build_cost(candidate), candidate.layout, candidate.rounds
    assert sketch is not None
    # Equal groups of few layers: moving one would cost more than it brings.
    if layout.virtual_stages > 1 or target.layer_partition is not None:
        return candidate
    known = (candidate.layer_partition, sketch)
    partition, rounds = choose_partition(
        build_cost, target.shape.num_layers, layout.num_groups, target.requests, candidate.rules(rules), known
    )
    return candidate if rounds is sketch else _better(target, candidate, partition, rounds, rules)


def _planned(target: Target, draft: Candidate, rules: Rules) -> Candidate:
    cost = _build_cost(draft)(draft.layer_partition)
    return _better(target, draft, draft.layer_partition, draft.rules(rules).plan(cost, target.requests), rules)


def _better(
    target: Target, candidate: Candidate, partition: tuple[int, ...], rounds: RoundPlan, rules: Rules
) -> Candidate:
    """The candidate with other rounds where these are better and fit into memory."""
    other = with_rounds(target, replace(candidate, layer_partition=partition), rounds, rules)
    return min(other, candidate, key=lambda each: each.score(rules.objective))


def with_rounds(target: Target, candidate: Candidate, rounds: RoundPlan, rules: Rules) -> Candidate:
    """The candidate with its rounds in their cheapest cuts, and refused if they do not fit into memory."""
    layout, costs, partition = candidate.layout, candidate.layout_costs, candidate.layer_partition
    rounds, cuts = with_cuts(rounds, costs, partition, target.requests, window=rules.window)
    if len(CUTS[layout.sp_kind]) > 1 or candidate.limits is not None:
        # No plan is better, whatever its cuts, and whatever the share of memory that its rounds take.
        bound = Bound(lambda: Problem.of(costs.floor_model(partition), target.requests, **rules.options))
        rounds = replace(rounds, bound=bound)
    memory = rounds_memory(
        target.shape,
        parallel_of(layout, candidate.layer_partition),
        target.requests,
        rounds.rounds,
        dtype=target.dtype,
        max_new_tokens=target.max_new_tokens,
        device_type=target.device_type,
        cuts=cuts,
    )
    refusal = target.refusal(layout, memory)
    return replace(candidate, rounds=rounds, cuts=cuts, memory=memory, refusal=refusal)

"""The search over layouts by branch and bound: the best partition and rounds of each that could still be the best."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from db.errors import UserError
from profiler.model import ModelShape
from profiler.sequence.kind import CUTS, SequenceCut, SPKind
from tuner.fit.holdout import HeldOutError
from tuner.fit.uncertainty import makespan_uncertainty
from tuner.fit.whole_costs import Costs
from tuner.plan.cost_model import CostModel
from tuner.plan.layout import Layout
from tuner.plan.memory import RUNTIME_BYTES, RankMemory, memory_refusal, rank_memory, rounds_memory
from tuner.plan.plan import Chunk, Parallel, Plan, Request, Weights
from tuner.plan.round_sizes import RoundSizes
from tuner.plan.stage_order import StageOrder
from tuner.rounds.problem import Problem
from tuner.rounds.round_plan import Bound, RoundPlan, rounds_to_plan
from tuner.rounds.schedule import Objective
from tuner.search.cuts import with_cuts
from tuner.search.floors import Batch, Floors
from tuner.search.links import Assumed
from tuner.search.partition import BuildCost, balanced_partition, choose_partition, even_partition
from tuner.search.rules import Rules

NEAR_SKETCH, NEAR_DRAFT = 1.025, 1.015
"""Layouts whose sketches are within this factor of the best are drafted, since other partitions gain a few percent;
those whose drafts are within the other one are planned in full, which gains less."""
MOST_DRAFTS, MOST_PLANS = 3, 2
"""How many are drafted at most, and how many of these are planned in full."""
SKETCHED_ROUNDS, HOPEFUL = 4, 1.05
"""Numbers of rounds that are tried where stages hold several groups; one where the estimate is above the best sketch
by more than the factor."""
FitLayout = Callable[[Layout], Costs]  # raises UserError when nothing was measured for the layout


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
    """One layout with its best plan, or with the reason why there is none: refused, or proven no better."""

    layout: Layout
    refusal: str | None = None
    floor: tuple[float, ...] | None = None
    """A bound on the score of all its plans: what it was left out for, where it has no rounds and no refusal."""
    costs: Costs | None = None
    layer_partition: tuple[int, ...] = ()
    rounds: RoundPlan | None = None
    cuts: tuple[SequenceCut, ...] = ()
    """How each round is cut among the ranks that share its rows."""
    memory: tuple[RankMemory, ...] = ()
    assumed: tuple[Assumed, ...] = ()
    """Messages whose times no rows tell."""

    @property
    def layout_costs(self) -> Costs:
        """The costs with the layout's groups of layers; `costs` are shared by layouts of the same work."""
        assert self.costs is not None
        return self.costs.interleaved(self.layout.virtual_stages, self.layout.stage_order)

    @property
    def is_proven_worse(self) -> bool:
        """Whether it was left out without being planned: no plan of it is better than the best one."""
        return self.rounds is None and self.refusal is None

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
        return makespan_uncertainty(
            held_out, self.costs.correction, extrapolates=self.extrapolates or bool(self.assumed)
        )

    def score(self, objective: Objective) -> tuple[float, ...]:
        """What to minimise; refused layouts come after all others."""
        if self.refusal or self.rounds is None:
            return (math.inf,)
        return self.rounds.evaluation.score(objective)

    def is_near(self, best: tuple[float, ...], objective: Objective, factor: float) -> bool:
        """Whether its score is within a factor of the best one; deadlines that are met are not told by factors."""
        score = self.score(objective)
        return math.isfinite(score[0]) and (objective is Objective.SLA or score[0] <= factor * best[0])


def search_layouts(
    target: Target, layouts: Sequence[Layout], rules: Rules, fit_layout: FitLayout, *, every: bool = False
) -> list[Candidate]:
    """The layouts, the best by the objective first, then those proven worse, refused ones last.

    Branch and bound: layouts are visited by what they could reach at best (`search.floors`), each is sketched on one
    partition, and those that cannot reach what the best sketch does are not planned at all. A sketch is a plan, so
    that no plan of those is better than the best. The best sketches are drafted, with the partition chosen along with
    the rounds, and the best drafts are planned in full.

    every: sketch all of them.
    """
    needs_room: dict[Layout, str | None] = {}

    def memory_refusal_of(layout: Layout) -> str | None:
        """The same for all that differ in their groups of layers alone."""
        plain = replace(layout, virtual_stages=1, stage_order=StageOrder.LOOP)
        if plain not in needs_room:
            needs_room[plain] = least_memory_refusal(target, plain)
        return needs_room[plain]

    def fitted(layout: Layout) -> Candidate:
        return _fitted(layout, memory_refusal_of, fit_layout)

    candidates = list(map(fitted, layouts))
    batch = Batch.of(target.requests, rules.limits.max_round_tokens)
    floors = Floors(batch, target.shape.num_layers)
    waiting: list[tuple[tuple[float, ...], bool, int]] = []

    def floor_of(candidate: Candidate, *, close: bool) -> tuple[float, ...]:
        assert candidate.costs is not None
        return floors.of(candidate.layout, candidate.costs).score(rules.objective, close=close)

    for index, candidate in enumerate(candidates):
        if candidate.costs is not None:
            waiting.append((floor_of(candidate, close=False), False, index))
    heapq.heapify(waiting)
    best: tuple[float, ...] = (math.inf,)
    while waiting:
        floor, is_close, index = heapq.heappop(waiting)
        candidate = candidates[index]
        if floor >= best and not every:
            candidates[index] = replace(candidate, floor=floor)
        elif not is_close:
            heapq.heappush(waiting, (floor_of(candidate, close=True), True, index))
        else:
            candidates[index] = sketched = replace(_sketched(target, candidate, rules, best), floor=floor)
            best = min(best, sketched.score(rules.objective))
            if sketched.refusal and (layout := _gathered(candidate.layout)):
                candidates[index] = gathered = fitted(layout)
                if gathered.costs is not None:
                    heapq.heappush(waiting, (floor_of(gathered, close=False), False, index))
    return _improved(target, candidates, rules)


def _improved(target: Target, candidates: list[Candidate], rules: Rules) -> list[Candidate]:
    """The candidates ranked, the best few of them drafted and planned in full."""

    def score(candidate: Candidate) -> tuple[float, ...]:
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
    return rounds_to_plan(
        candidate.rounds,
        requests=target.requests,
        model=dict(target.shape.config) | {"name": target.shape.name, "backend": str(target.shape.backend)},
        precision=target.dtype,
        parallel=_parallel(layout, candidate.layer_partition),
        window=rules.window,
        threads_per_rank=target.threads_per_rank,
        cost_model=candidate.layout_costs.cost_model(candidate.layer_partition).to_json(),
        cuts=candidate.cuts if layout.sp_kind is not SPKind.NONE else (),
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


def _fitted(layout: Layout, memory_refusal_of: Callable[[Layout], str | None], fit_layout: FitLayout) -> Candidate:
    """The layout with its costs, or the reason why it cannot run whatever the rounds.

    Weights that do not fit whole are gathered where ranks share them.
    """
    refusal = layout.refusal or memory_refusal_of(layout)
    if refusal and not layout.refusal and (gathered := _gathered(layout)):
        return _fitted(gathered, memory_refusal_of, fit_layout)
    if refusal:
        return Candidate(layout=layout, refusal=refusal)
    try:
        costs = fit_layout(layout)
    except UserError as error:
        return Candidate(layout=layout, refusal=str(error))
    return Candidate(layout=layout, costs=costs)


def _gathered(layout: Layout) -> Layout | None:
    """The layout with weights cut over the ranks of a sequence-parallel group, where these held them whole."""
    whole = layout.sp_size > 1 and layout.weights is Weights.WHOLE
    return replace(layout, weights=Weights.GATHERED) if whole else None


def _build_cost(candidate: Candidate) -> BuildCost:
    """The cost models of the layout's partitions, each built once."""
    return cache(candidate.layout_costs.cost_model)


def _sketched(target: Target, candidate: Candidate, rules: Rules, best: tuple[float, ...]) -> Candidate:
    """Drafted for one partition, that of least work on the fullest stage.

    best: the score of the best sketch so far; one that is likely to be far off is made with less care.
    """
    build_cost, layout = _build_cost(candidate), candidate.layout
    if layout.virtual_stages == 1:
        partition = balanced_partition(build_cost, target.shape.num_layers, layout.pp_size, target.requests)
        rounds = rules.draft(build_cost(partition), target.requests)
    else:
        partition = even_partition(target.shape.num_layers, layout.num_groups)
        cost = build_cost(partition)
        hopeful_s = HOPEFUL * best[0] if rules.objective is Objective.MAKESPAN else math.inf
        rounds = rules.sketch(cost, _shorter(cost), target.requests, SKETCHED_ROUNDS, hopeful_s)
    return with_rounds(target, replace(candidate, layer_partition=partition), rounds, rules)


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
    if layout.virtual_stages > 1:  # equal groups of few layers: moving one would cost more than it brings
        return candidate
    known = (candidate.layer_partition, sketch)
    partition, rounds = choose_partition(
        build_cost, target.shape.num_layers, layout.num_groups, target.requests, rules, known
    )
    return candidate if rounds is sketch else _better(target, candidate, partition, rounds, rules)


def _planned(target: Target, draft: Candidate, rules: Rules) -> Candidate:
    cost = _build_cost(draft)(draft.layer_partition)
    return _better(target, draft, draft.layer_partition, rules.plan(cost, target.requests), rules)


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
    if len(CUTS[layout.sp_kind]) > 1:  # no plan is better, whatever its cuts
        bound = Bound(lambda: Problem.of(costs.floor_model(partition), target.requests, **rules.options))
        rounds = replace(rounds, bound=bound)
    memory = rounds_memory(
        target.shape,
        _parallel(layout, candidate.layer_partition),
        target.requests,
        rounds.rounds,
        dtype=target.dtype,
        max_new_tokens=target.max_new_tokens,
        device_type=target.device_type,
        cuts=cuts,
    )
    refusal = memory_refusal(
        memory,
        stage_size=layout.stage_size,
        device_type=target.device_type,
        memory_bytes=target.memory_bytes,
    )
    return replace(candidate, rounds=rounds, cuts=cuts, memory=memory, refusal=refusal)


def least_memory_refusal(target: Target, layout: Layout) -> str | None:
    """Why the layout does not fit into memory whatever its partition and rounds, or None where it may.

    Of all ranks' weights and of the longest prompt's KV, the fullest rank holds at least the mean.
    """
    partition = even_partition(target.shape.num_layers, layout.num_groups)
    longest = max(target.requests, key=lambda request: request.prompt_tokens)
    parallel = _parallel(layout, partition)
    sizes = RoundSizes.of(parallel, [longest], [_whole(longest)], max_new_tokens=target.max_new_tokens)
    stages = rank_memory(target.shape, parallel, sizes, dtype=target.dtype, device_type=target.device_type)
    mean = RankMemory(
        weights_bytes=sum(stage.weights_bytes for stage in stages) // len(stages),
        kv_bytes=sum(stage.kv_bytes for stage in stages) // len(stages),
        activation_bytes=0,
        unsent_bytes=0,
        runtime_bytes=RUNTIME_BYTES[target.device_type],
    )
    return memory_refusal(
        (mean,) * (1 if target.device_type == "cuda" else len(stages)),
        stage_size=layout.stage_size,
        device_type=target.device_type,
        memory_bytes=target.memory_bytes,
    )


def _whole(request: Request) -> tuple[Chunk]:
    """The prompt in one chunk."""
    return (Chunk(0, request.cached_tokens, request.new_tokens),)

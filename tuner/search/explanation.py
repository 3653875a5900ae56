"""Explains why a layout won: where the time goes, and at which links, prompt lengths and batches another would win.

All by the objective that was planned for."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.layout import Layout
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import Floats
from tuner.policies.fixed import fixed_rounds
from tuner.rounds.problem import Problem, arrive_over_time
from tuner.rounds.schedule import Evaluation, FlatRounds, RoundTimes, evaluate
from tuner.search.layouts import Candidate
from tuner.search.partition import even_partition
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.workload.objective import Objective

LINK_FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
"""Speeds of all links, over the measured or given ones."""
LENGTH_FACTORS = (1 / 16, 1 / 4, 1.0, 4.0)
"""Lengths of all prompts, over those asked for."""
BATCHES = (1, 4, 16)
"""How often the prompts come."""
MAP_FACTORS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
MAP_LENGTHS = tuple(1 << power for power in range(10, 18))
"""Axes of the map: links and prompt lengths."""
MOST_CONTENDERS = 16
"""Layouts that compete on the map, the best here first."""
CUTS_TRIED = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rounds that a prompt or a batch is cut into on the map."""
HOPELESS = 1.2
"""Where so many times the best seconds are taken with some chunks, smaller ones are not tried."""
MOST_TOKENS = 1 << 21
"""Of a batch on the map."""
NOTHING: tuple[float, ...] = (math.inf,)
"""The score of what cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Seconds of a makespan or a TTFT, the mean over the stages; they add up to it."""

    compute_s: float
    """Token-wise work: products, norms, what a round costs beside its layers."""
    attention_s: float
    messages_s: float
    """Of collectives, what is not hidden behind work."""
    bubble_s: float
    """Waiting: for the pipeline to fill and drain, for hand-offs, for longer rounds."""

    @property
    def total_s(self) -> float:
        """The whole."""
        return self.compute_s + self.attention_s + self.messages_s + self.bubble_s

    def to_json(self) -> dict[str, float]:
        """The same as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """The best layout at one place of the map, by a plan of equal chunks."""

    prompt_tokens: int
    """Of the longest prompt."""
    num_requests: int
    link_factor: float
    """How much faster all links are than here."""
    layout: Layout | None
    """None: no layout that competes has room for the batch."""
    sought: float
    """The figure that the objective is about, of the winner's plan: seconds, or the share of the deadlines met."""
    runner_up: Layout | None = None
    lead: float | None = None
    """How much longer the next best layout takes, as a share; None where seconds are not what counts."""

    def to_json(self) -> dict[str, object]:
        """The same as a JSON object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "num_requests": self.num_requests,
            "link_factor": self.link_factor,
            "layout": self.layout and str(self.layout),
            "family": self.layout and self.layout.family,
            "sought": self.sought if self.layout else None,
            "runner_up": self.runner_up and str(self.runner_up),
            "lead": self.lead,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why the best layout won."""

    families: tuple[Candidate, ...]
    """The best of each family that was planned, the best first."""
    parts: tuple[Parts, ...]
    """Of each of them: of what `parts_of` is about."""
    objective: Objective = Objective.MAKESPAN
    """By what layouts are compared."""
    parts_of: Objective = Objective.MAKESPAN
    """The makespan where parts add up to nothing that is sought: of deadlines, or of requests that arrive over time."""
    link_gb_s: float | None = None
    """What a hand-off between stages moves a second here, where it is known."""
    by_link: tuple[Winner, ...] = ()
    by_length: tuple[Winner, ...] = ()
    by_batch: tuple[Winner, ...] = ()
    map: tuple[Winner, ...] = ()
    """Prompt length by link speed, one prompt, by its TTFT; made for a picture alone."""

    def to_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "objective": self.objective,
            "seconds_of": self.parts_of,
            "families": [
                {"family": one.layout.family, "layout": str(one.layout), "seconds": parts.to_json()}
                for one, parts in zip(self.families, self.parts, strict=True)
            ],
            "link_gb_s": self.link_gb_s,
            "by_link": [winner.to_json() for winner in self.by_link],
            "by_length": [winner.to_json() for winner in self.by_length],
            "by_batch": [winner.to_json() for winner in self.by_batch],
            "map": [winner.to_json() for winner in self.map],
        }


def best_of_families(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Of candidates in order, the first of each family that was planned and not refused."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.rounds is not None and not candidate.refusal:
            found.setdefault(candidate.layout.family, candidate)
    return tuple(found.values())


def explain(target: Target, candidates: Sequence[Candidate], rules: Rules, *, with_map: bool = False) -> Explanation:
    """Why the first of the candidates won; those proven worse here compete elsewhere, too.

    Of requests that arrive over time only the parts are given: their makespan is mostly waiting for the last.
    """
    families, objective, requests = best_of_families(candidates), rules.objective, target.requests
    of = Objective.MAKESPAN if objective.needs_deadlines or arrive_over_time(requests) else objective
    parts = tuple(parts_of(target, candidate, replace(rules, objective=of)) for candidate in families)
    if arrive_over_time(requests):
        return Explanation(families=families, parts=parts, objective=objective, parts_of=of)
    arena = Arena(target, candidates, rules)
    byte_s = max((one.costs.hop_byte_s for one in arena.contenders if one.costs is not None), default=0.0)
    return Explanation(
        families=families,
        parts=parts,
        objective=objective,
        parts_of=of,
        link_gb_s=1e-9 / byte_s if byte_s else None,
        by_link=tuple(arena.winner(requests, factor) for factor in LINK_FACTORS),
        by_length=tuple(arena.winner(_longer(target, factor)) for factor in LENGTH_FACTORS),
        by_batch=tuple(arena.winner(_repeated(requests, times)) for times in BATCHES),
        map=tuple(Arena(target, candidates, replace(rules, objective=Objective.MAKESPAN)).map()) if with_map else (),
    )


def parts_of(target: Target, candidate: Candidate, rules: Rules) -> Parts:
    """Where the seconds of a planned candidate's makespan, mean TTFT or 99th percentile go, of a batch.

    Messages are what rounds take longer than with links of no time at all; attention what the rest takes longer than
    without it. A round counts for each TTFT that it comes before.
    """
    assert candidate.rounds is not None
    costs, partition = candidate.layout_costs, candidate.layer_partition
    evaluation, rounds = candidate.rounds.evaluation, candidate.rounds.rounds
    counts = np.cumsum(_ends(target.requests, rounds, evaluation, rules.objective)[::-1])[::-1]

    def seconds(cost: CostModel) -> float:
        return float(evaluate(cost, target.requests, rounds, rules.window).round_s.sum(axis=1) @ counts)

    silent = costs.with_links(math.inf).cost_model(partition)
    silent_s, bare_s = seconds(silent), seconds(silent.without_attention())
    with_cuts_s = float(evaluation.round_s.sum(axis=1) @ counts)
    usual_s = seconds(costs.cost_model(partition))
    saved = with_cuts_s / usual_s if usual_s else 1.0  # by other cuts than the usual one, of all parts alike
    stages = candidate.layout.pp_size
    return Parts(
        compute_s=saved * bare_s / stages,
        attention_s=saved * (silent_s - bare_s) / stages,
        messages_s=saved * (usual_s - silent_s) / stages,
        bubble_s=evaluation.sought(rules.objective) - with_cuts_s / stages,
    )


def _ends(requests: Sequence[Request], rounds: Sequence[Round], evaluation: Evaluation, objective: Objective) -> Floats:
    """How much the end of each round counts in the figure sought, [num_rounds]; one in all."""
    counts = np.zeros(len(rounds))
    if objective is Objective.MAKESPAN:
        counts[-1] = 1.0
        return counts
    weights = np.array([request.weight for request in requests])
    weights = weights if weights.any() else np.ones(len(requests))
    if objective is Objective.P99_TTFT:  # between two of the TTFTs, as numpy has it
        place = 0.99 * (len(requests) - 1)
        by_ttft, after = np.argsort(evaluation.ttft_s, kind="stable"), place - math.floor(place)
        weights = np.zeros(len(requests))
        weights[by_ttft[math.floor(place)]] += 1.0 - after
        weights[by_ttft[math.ceil(place)]] += after
    for index, chunks in enumerate(rounds):
        for chunk in chunks:
            if chunk.end == requests[chunk.request].prompt_tokens:
                counts[index] += weights[chunk.request]
    ends: Floats = counts / counts.sum()
    return ends


class Arena:
    """Compares layouts under other links, lengths and batches, by plans that are quick to make: equal chunks
    of a few sizes on even layers, requests in the order that the objective wants. Memory is not checked again.

    Who competes: of each family and sizes the layout of all ranks that is best here, as planned, or by what it could
    reach at best where it was not.
    """

    def __init__(self, target: Target, candidates: Sequence[Candidate], rules: Rules) -> None:
        self._target, self._rules, self._objective = target, rules, rules.objective
        # On one stage shorter rounds bring nothing but earlier first tokens of prompts that end before the last.
        self._most_cuts = 3 if rules.objective is Objective.MAKESPAN else len(CUTS_TRIED)
        self._models: dict[tuple[Layout, float], CostModel] = {}
        self._rounds: dict[tuple[object, ...], FlatRounds] = {}
        self._winners: dict[tuple[object, ...], Winner] = {}
        runs = [candidate for candidate in candidates if not candidate.refusal and candidate.costs is not None]
        most = max((candidate.layout.world_size for candidate in runs), default=1)
        first: dict[tuple[object, ...], Candidate] = {}
        for candidate in runs:
            layout = candidate.layout
            # Sizes compete where a schedule takes a moment to judge; of interleaved layouts one of each family.
            sizes = (layout.tp_size, layout.sp_size) if layout.virtual_stages == 1 else ()
            if layout.world_size == most:
                first.setdefault((layout.family, *sizes), candidate)
        self.contenders = list(first.values())[:MOST_CONTENDERS]

    def winner(self, requests: Sequence[Request], link_factor: float = 1.0) -> Winner:
        """The best layout for these requests over links so much faster."""
        key = (link_factor, *(replace(request, id="") for request in requests))
        if key not in self._winners:
            self._winners[key] = self._winner(requests, link_factor)
        return self._winners[key]

    def _winner(self, requests: Sequence[Request], link_factor: float) -> Winner:
        scored: list[tuple[tuple[float, ...], int]] = []
        in_order = sorted(requests, key=self._place)
        for index, candidate in enumerate(self.contenders):
            second = scored[1][0] if len(scored) > 1 else NOTHING
            insort(scored, (self._score(candidate, in_order, link_factor, second), index))
        nothing = Winner(
            layout=None,
            sought=math.inf,
            prompt_tokens=max(request.prompt_tokens for request in requests),
            num_requests=len(requests),
            link_factor=link_factor,
        )
        if not scored or scored[0][0] == NOTHING:
            return nothing
        best_score, best = scored[0]
        found = replace(nothing, layout=self.contenders[best].layout, sought=self._sought(best_score))
        if len(scored) < 2 or scored[1][0] == NOTHING:
            return found
        second_score, second_best = scored[1]
        lead = None if self._objective.needs_deadlines else second_score[0] / best_score[0] - 1.0
        return replace(found, runner_up=self.contenders[second_best].layout, lead=lead)

    def _place(self, request: Request) -> float:
        """Requests with the least of it run first; of equals the first."""
        if self._objective.needs_deadlines:
            return math.inf if request.sla_ttft_s is None else request.sla_ttft_s
        if self._objective is Objective.MAKESPAN:
            return 0.0
        weight = request.weight if self._objective is Objective.MEAN_TTFT else 1.0
        return request.new_tokens / max(weight, 1e-300)

    def _sought(self, score: tuple[float, ...]) -> float:
        return -score[0] if self._objective is Objective.SLA else score[0]

    def map(self) -> Iterator[Winner]:
        """One prompt of each length over each link, row by row of links."""
        most = self._target.shape.max_positions
        lengths = [length for length in MAP_LENGTHS if length <= most]
        for factor in MAP_FACTORS:
            for length in lengths:
                yield self.winner([Request(id="map", prompt_tokens=length)], factor)

    def _score(
        self, candidate: Candidate, requests: Sequence[Request], link_factor: float, most: tuple[float, ...]
    ) -> tuple[float, ...]:
        """Of the best of a few equal chunks; infinite where none of them is below `most`."""
        problem = Problem.of(self._model(candidate, link_factor), requests, **self._rules.options)
        total = sum(request.new_tokens for request in requests)
        if total > MOST_TOKENS:
            return NOTHING
        multiple, tried, best = problem.chunk_multiple, set[int](), NOTHING
        for cuts in CUTS_TRIED if candidate.layout.pp_size > 1 else CUTS_TRIED[: self._most_cuts]:
            size = multiple * max(1, -(-total // (cuts * multiple)))
            most_tokens = self._rules.limits.max_round_tokens
            size = size if most_tokens is None else min(size, most_tokens)
            if size not in tried:
                tried.add(size)
                times = RoundTimes.of(problem.cost, problem.requests, self._fixed(problem, size))
                score = times.least_score(problem.cost, problem.requests, self._objective)
                if score > most:
                    continue
                if not self._is_hopeless(score, best):
                    score = times.evaluation(problem.cost, problem.requests, problem.window).score(self._objective)
                if self._is_hopeless(score, best):  # smaller chunks are worse still
                    break
                best = min(best, score)
        return best

    def _is_hopeless(self, score: tuple[float, ...], best: tuple[float, ...]) -> bool:
        return not self._objective.needs_deadlines and score[0] > HOPELESS * best[0]

    def _fixed(self, problem: Problem, size: int) -> FlatRounds:
        """Rounds of so many tokens; of requests that are all there they are the same on every layout."""
        key = (size, *((request.prompt_tokens, request.cached_tokens) for request in problem.requests))
        if key not in self._rounds:
            self._rounds[key] = FlatRounds.of(fixed_rounds(problem, size))
        return self._rounds[key]

    def _model(self, candidate: Candidate, link_factor: float) -> CostModel:
        key = (candidate.layout, link_factor)
        if key not in self._models:
            partition = even_partition(self._target.shape.num_layers, candidate.layout.num_groups)
            self._models[key] = candidate.layout_costs.with_links(link_factor).cost_model(partition)
        return self._models[key]


def _longer(target: Target, factor: float) -> list[Request]:
    """The requests with prompts so much longer, as far as the model's positions go."""
    most = target.shape.max_positions - target.max_new_tokens + 1
    return [
        replace(request, prompt_tokens=min(max(int(factor * request.prompt_tokens), 1), most), cached_tokens=0)
        for request in target.requests
    ]


def _repeated(requests: Sequence[Request], times: int) -> list[Request]:
    return [replace(request, id=f"{request.id}-{copy}") for copy in range(times) for request in requests]

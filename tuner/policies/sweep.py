"""The search that `dp` and `joint` share: pack under many caps around the relaxation's, judge each plan exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.ends.one_machine import most_on_time
from tuner.rounds.packing.packer import Packer
from tuner.rounds.packing.worth import MOST_TAILS, WorthPacker
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work, envelopes, likely_cap_s
from tuner.rounds.round_budgets import QueueBudgets, context_token_s, round_overhead_s
from tuner.rounds.schedule import Evaluation, FlatRounds, RoundTimes
from tuner.rounds.uneven import busiest_stage
from tuner.workload.objective import Objective

Pack = Callable[[Packer, Sequence[Request], Sequence[int], Sequence[float]], list[Round]]
"""(packer, requests, order, cap of each request) -> rounds."""

ROUNDS_SWEPT = 2_400
"""Rounds over all caps of one sweep: with many rounds a plan, their whole number matters less and fewer caps do."""
LEAST_CAPS, MANY_CAPS, MOST_CAPS = 6, 24, 72
CAP_POWERS = (0.25, 0.5)
"""Exponents of the share of the work done that are tried for the mean TTFT."""
ROUNDING = 1e-9
FAR = 1.01
"""Of a large batch, a way to pack whose plan at the best known cap is above this factor of the best is not swept."""

USUAL = 90.0
"""Percentile of a plan's rounds that stands for all of them."""
START, STEPS = (1.0, 0.6), (1.5, 1.15)
"""Where the search for the longest and the outermost rounds begins, by the usual one, and factors of its steps."""
WORTH_TAILS, LEAST_WORTH = 8_000, 5
"""Rounds times prompts looked at for each, of all plans that are filled by worth, about 0.1 s; where that is less than
so many plans, none is."""


@dataclass(slots=True)
class ScoredRounds:
    """A plan and how good it is, the smaller the score the better."""

    score: tuple[float, ...]
    evaluation: Evaluation
    rounds: list[Round]


@dataclass(slots=True)
class Search:
    """The candidates found so far: the best for each number of rounds."""

    problem: Problem
    packer: Packer
    cap_s: float
    best_cap_s: float = 0.0
    """Where an earlier sweep of a large batch found its best plan; 0 if none did."""
    effort: float = 1.0
    """Share of the caps that a sweep tries."""
    num_needed: int = 1
    """How many of the best candidates will be looked at again."""
    limit_s: float = np.inf
    """Makespans above it count as worse than any below."""
    found: dict[int, ScoredRounds] = field(default_factory=dict)
    _evaluations: dict[bytes, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, effort: float = 1.0, num_needed: int = 1) -> Search:
        """A search that has found nothing yet."""
        return cls(problem, Packer.of(problem), central_cap_s(problem), effort=effort, num_needed=num_needed)

    def towards(self, objective: Objective) -> Search:
        """The same candidates for another objective, to be added to; evaluations are shared."""
        return replace(self, problem=replace(self.problem, objective=objective), found=dict(self.found))

    def score(self, evaluation: Evaluation, objective: Objective) -> tuple[float, ...]:
        """What to minimise, the most important first."""
        return (max(evaluation.makespan_s - self.limit_s, 0.0), *evaluation.score(objective))

    def ranked(self) -> list[ScoredRounds]:
        """The best candidate for each number of rounds, the best first."""
        return sorted(self.found.values(), key=lambda candidate: candidate.score)

    def sweep(self, pack: Pack, order: Sequence[int], profile: Sequence[float], objective: Objective) -> None:
        """Pack under caps around `cap_s`, then twice closer around the best; `profile` scales each request's cap.

        Where every chunk costs much whatever its length, `cap_s` is far too small: it is doubled while that helps.
        """
        tried: dict[float, tuple[float, ...]] = {}
        requests, most_s = self.problem.requests, np.inf

        def attempt(cap: float) -> int:
            nonlocal most_s
            if cap in tried:
                return 0
            rounds = pack(self.packer, requests, order, [cap * share for share in profile])
            tried[cap] = self.keep(rounds, objective, most_s)
            most_s = min(most_s, tried[cap][1])
            return len(rounds)

        def best() -> float:
            return min(tried, key=tried.__getitem__)

        centre = self.best_cap_s or self.cap_s
        num_rounds = attempt(centre)
        while not self.best_cap_s:
            fewer, doubled = attempt(2.0 * centre), 2.0 * centre
            if tried[doubled] >= tried[centre]:
                break
            num_rounds, centre = fewer, doubled
        far = objective is Objective.MAKESPAN and self.best_cap_s > 0.0
        if far and most_s > FAR * min(each.evaluation.makespan_s for each in self.found.values()):
            return  # caps a few percent longer or shorter, which are all that is tried, change less
        num_caps = int(np.clip(self.effort * ROUNDS_SWEPT // num_rounds, LEAST_CAPS, self.effort * MOST_CAPS))
        window, pp_size = self.problem.window, self.problem.cost.pp_size
        narrow = window is not None and window < pp_size
        if narrow or num_caps >= MANY_CAPS:  # a window below the number of stages wants longer rounds
            num_caps, widths = num_caps // 3, [0.2, 0.4 / (num_caps // 3)]
            for factor in np.geomspace(0.4, 16.0 if narrow else 4.0, num_caps):
                attempt(self.cap_s * float(factor))
        elif not self.best_cap_s:
            num_caps, widths = num_caps // 2, [0.1, 0.05]
        else:  # only around where an earlier sweep found its best
            num_caps, widths = 3, [0.03]
        for width in widths:
            centre = best()
            for factor in np.linspace(1.0 - width, 1.0 + width, num_caps):
                attempt(centre * float(factor))
        if num_caps < MANY_CAPS // 3:  # a large batch: later sweeps start where this one found its best
            self.best_cap_s = best()

    def keep(self, rounds: list[Round], objective: Objective, most_s: float = 0.0) -> tuple[float, ...]:
        """Take a plan as a candidate; its score.

        Of the makespan's, one that is provably above `most_s` and above all that will be looked at again is scored by
        what proves it and left out.
        """
        problem, flat = self.problem, FlatRounds.of(rounds)
        shape = flat.tobytes()
        if shape in self._evaluations:
            evaluation = self._evaluations[shape]
        elif problem.is_timed:
            evaluation = problem.evaluate(rounds)
        else:
            times = RoundTimes.of(problem.cost, problem.requests, flat)
            if problem.objective is Objective.MAKESPAN:
                least_s = (1.0 - ROUNDING) * times.least_makespan_s(problem.cost)
                if least_s > max(most_s, self._most_needed_s(len(rounds))):
                    return (0.0, least_s, np.inf)
            evaluation = times.evaluation(problem.cost, problem.requests, problem.window)
        self._evaluations[shape] = evaluation
        score = self.score(evaluation, objective)
        self._keep(ScoredRounds(score, evaluation, rounds))
        return score

    def _most_needed_s(self, num_rounds: int) -> float:
        """Above this makespan, a plan of so many rounds is not looked at again."""
        makespans_s = sorted(candidate.evaluation.makespan_s for candidate in self.found.values())
        worst_s = makespans_s[self.num_needed - 1] if len(makespans_s) >= self.num_needed else np.inf
        known = self.found.get(num_rounds)
        return min(worst_s, known.evaluation.makespan_s) if known else worst_s

    def limit(self, makespan_s: float, objective: Objective) -> None:
        """From now on prefer plans within a makespan, then by another objective; score what was found anew."""
        self.limit_s = makespan_s
        for candidate in self.found.values():
            candidate.score = self.score(candidate.evaluation, objective)

    def _keep(self, candidate: ScoredRounds) -> None:
        known = self.found.get(len(candidate.rounds))
        if known is None or candidate.score < known.score:
            self.found[len(candidate.rounds)] = candidate

    def sweep_by_worth(self) -> None:
        """Fill rounds by worth under several longest and outermost ones, by those of the best plan known."""
        problem = self.problem
        busiest = busiest_stage(problem.cost, Work.of(problem.requests, problem.limits.max_round_tokens))
        round_s = self.ranked()[0].evaluation.round_s[:, busiest]
        usual_s, total_s = float(np.percentile(round_s, USUAL)), float(round_s.sum())
        most = WORTH_TAILS // (len(round_s) * min(len(problem.requests), MOST_TAILS))
        tried, packers = dict[tuple[float, float], tuple[float, ...]](), dict[float, WorthPacker]()

        def attempt(longest: float, outer: float) -> bool:
            """Whether it is the best so far."""
            outer = min(outer, longest)
            if len(tried) >= most or (longest, outer) in tried:
                return False
            if longest not in packers:
                packers[longest] = WorthPacker(problem, longest * usual_s)
            rounds = packers[longest].pack(outer * usual_s, total_s)
            tried[longest, outer] = self.keep(rounds, Objective.MAKESPAN)
            return min(tried, key=tried.__getitem__) == (longest, outer)

        if most < LEAST_WORTH:
            return
        at = START
        attempt(*at)
        for step in STEPS:
            improved = True
            while improved:
                improved = False
                for way in ((step, 1.0), (1.0 / step, 1.0), (1.0, step), (1.0, 1.0 / step)):
                    while attempt(at[0] * way[0], at[1] * way[1]):
                        at, improved = min(tried, key=tried.__getitem__), True


def central_cap_s(problem: Problem) -> float:
    """The cap at which the relaxed makespan on the slowest stage is least."""
    work = Work.of(problem.requests, problem.limits.max_round_tokens)
    slowest = envelopes([slowest_stage(problem)], work)
    # Of several groups a stage the work counts once each, what fills the pipeline once.
    stages_after = (problem.cost.pp_size - 1) / problem.cost.virtual_stages
    return max(likely_cap_s(envelope, work, stages_after) for envelope in slowest)


def slowest_stage(problem: Problem) -> StageCost:
    """The stage on which the batch takes longest."""
    chunks = [(request.new_tokens, request.cached_tokens, True) for request in problem.requests]
    return max(problem.cost.kinds, key=lambda kind: kind.seconds(chunks))


def work_s(problem: Problem) -> list[float]:
    """Seconds each request takes on the slowest stage, cut nowhere."""
    stage = slowest_stage(problem)
    tokens = np.array([request.new_tokens for request in problem.requests])
    cached = np.array([request.cached_tokens for request in problem.requests])
    seconds: Floats = stage.round_overhead_s + stage.tokens_s(tokens) + stage.chunk_seconds(tokens, cached, True)
    found: list[float] = seconds.tolist()
    return found


def shortest_first(problem: Problem) -> list[int]:
    """Least work for its weight first (Smith's rule): optimal for the weighted mean on one machine."""
    work, requests = work_s(problem), problem.requests
    return sorted(range(len(requests)), key=lambda i: work[i] / max(requests[i].weight, 1e-12))


def request_orders(problem: Problem) -> list[list[int]]:
    """Orders worth packing in: shortest first; for deadlines also earliest deadline first and Moore-Hodgson's."""
    orders = [shortest_first(problem)]
    if problem.objective.needs_deadlines:
        work, requests = work_s(problem), problem.requests
        deadline = [np.inf if r.sla_ttft_s is None else r.arrival_s + r.sla_ttft_s for r in requests]
        by_deadline = sorted(range(len(requests)), key=lambda i: deadline[i])
        orders += [by_deadline, most_on_time(by_deadline, work, deadline)]
    return orders


def whole_rounds(problem: Problem, order: Sequence[int]) -> list[Round]:
    """Each prompt in rounds of its own, whole where a round may be so long: on one stage no other request ends sooner
    for having shared them."""
    most = problem.limits.max_round_tokens or max(request.new_tokens for request in problem.requests)
    most -= most % problem.chunk_multiple if most > problem.chunk_multiple else 0
    return [
        (Chunk(index, start, min(most, request.prompt_tokens - start)),)
        for index, request in ((index, problem.requests[index]) for index in order)
        for start in range(request.cached_tokens, request.prompt_tokens, most)
    ]


def budget_profiles(problem: Problem, order: Sequence[int]) -> list[list[float]]:
    """Each request's share of the cap, in each way that is worth a try for the mean TTFT: those of
    `rounds.round_budgets`, and powers of the share of the work done by a request's end.

    A request that ends after S seconds of work in rounds of m seconds waits about S (1 + o/m) + (K-1) m, least at
    m = sqrt(S o / (K-1)): rounds grow with the square root of the work done so far.
    """
    work, requests = work_s(problem), [problem.requests[index] for index in order]
    budgets = QueueBudgets(
        work_s=[work[index] for index in order],
        context_work=[work[i] * (r.cached_tokens + r.new_tokens / 2.0) for i, r in zip(order, requests, strict=True)],
        weights=[request.weight for request in requests],
        overhead_s=round_overhead_s(problem.cost),
        context_token_s=context_token_s(problem.cost),
        stages_after=problem.cost.pp_size - 1,
    )
    done = np.cumsum(budgets.work_s)
    powers = [(done / max(float(done[-1]), 1e-300)) ** power for power in CAP_POWERS]
    budgets_tried = [*budgets.choices(problem.max_makespan_increase), budgets.for_makespan()]
    choices = [np.array(choice) for choice in budgets_tried]  # infinite on one stage
    shares = [np.divide(cap, cap.max(), out=np.ones(len(cap)), where=cap < cap.max()) for cap in choices]
    place = np.argsort(order)
    return [share[place].tolist() for share in [*shares, *powers]]

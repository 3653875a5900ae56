"""When each round starts and finishes on each stage: the exact pipeline recurrence and what follows from it.

    start(i,k)  = max( finish(i-1,k),
                       finish(i,k-1) + hop(i)              for k > 0,
                       finish(i-W,K-1) + return_s          for k = 0 and i >= W,
                       ready(i)                            for k = 0 )
    finish(i,k) = start(i,k) + t(i,k)

Within a stage the recurrence is a running maximum: with S the prefix sums of t, finish(i) - S(i) is the maximum over
j <= i of earliest(j) - S(j-1). So a stage is one `np.maximum.accumulate` over all rounds, or over W rounds at a time
with a window (round i waits for round i-W only, so W rounds are independent of one another's windows).

Where a stage holds several groups of layers the same holds for each group k, with K the number of groups, but for two
things: a stage runs its tasks in the order of `tuner.plan.task_order`, so that instead of finish(i-1,k) it waits for
the task before in that order (KV is there: in a group rounds run in order); and there is no hop where the group before
is on the same stage. Where requests arrive over time, that order would hold a round up inside the pipeline until
requests have come that are not there yet. A stage then takes, of the tasks that are there when it is free, the first in
that order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import CostModel, Ints
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import Floats
from tuner.plan.task_order import TaskOrder, task_order
from tuner.serving.answers import Answers
from tuner.serving.clock import Clock
from tuner.workload.objective import Objective

MAKESPAN_SLACK = 1.0075
"""A plan for mean TTFT or deadlines has at most this much times the best makespan found."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and finish seconds of every round in every group (stage), both [num_rounds, num_groups]."""

    start_s: Floats
    finish_s: Floats

    @property
    def makespan_s(self) -> float:
        """Seconds until the last round leaves the last group."""
        return float(self.finish_s[-1, -1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What the cost model says of rounds."""

    makespan_s: float
    ttft_s: tuple[float, ...]
    """Of each request, counted from its arrival."""
    mean_ttft_s: float
    """Weighted by the requests' weights."""
    num_sla_met: int
    """Requests whose TTFT and TPOT meet their limits (those without one count as met)."""
    sla_weight: float
    """Weight of the requests with a limit on TTFT or TPOT that meet it, as a share of all with one; 1 where none has
    one."""
    lateness_s: float
    """The largest TTFT less its deadline; minus infinity where no request has one."""
    bubble_share: float
    """Share of all stages' time up to the makespan in which they wait."""
    timeline: Timeline
    round_s: Floats
    """Seconds of each round in each group, [num_rounds, num_groups]."""
    tpot_s: tuple[float, ...] = ()
    """Of each request, 0 with an answer of one token; empty where nothing is decoded."""
    has_limits: bool = False
    """Whether some request has a limit of TTFT or TPOT."""

    @property
    def p90_ttft_s(self) -> float:
        """90th percentile of the TTFTs."""
        return float(np.percentile(self.ttft_s, 90))

    @property
    def p99_ttft_s(self) -> float:
        """99th percentile of the TTFTs."""
        return float(np.percentile(self.ttft_s, 99))

    def score(self, objective: Objective) -> tuple[float, ...]:
        """What to minimise, the most important first."""
        if objective is Objective.MAKESPAN:
            return (self.makespan_s, self.mean_ttft_s)
        if objective is Objective.MEAN_TTFT:
            return (self.mean_ttft_s, self.makespan_s)
        if objective is Objective.P99_TTFT:
            return (self.p99_ttft_s, self.mean_ttft_s, self.makespan_s)
        if objective is Objective.LATENESS:
            return (self.lateness_s, self.mean_ttft_s, self.makespan_s)
        return (-self.sla_weight, self.mean_ttft_s, self.makespan_s)


@dataclass(frozen=True, slots=True)
class FlatRounds:
    """Rounds as columns, one entry a chunk, sorted by round."""

    round_index: Ints
    request: Ints
    start: Ints
    tokens: Ints

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> FlatRounds:
        """Flatten rounds."""
        rows = [(i, chunk.request, chunk.start, chunk.tokens) for i, chunks in enumerate(rounds) for chunk in chunks]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 4).T.copy())

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return int(self.round_index[-1]) + 1 if self.round_index.size else 0


def simulate(
    stage_s: Floats,
    hop_s: Floats | None = None,
    window: int | None = None,
    return_s: float = 0.0,
    ready_s: Floats | None = None,
    free_s: Floats | None = None,
    order: TaskOrder | None = None,
    in_order: bool = True,
) -> Timeline:
    """Run the recurrence.

    `stage_s` is [num_rounds, num_groups], `hop_s` and `ready_s` (the earliest start on stage 0) are [num_rounds],
    `free_s` (when each stage ends what ran before the first round) is [pp_size]. `order` is that of stages with several
    groups; without it each group is a stage. `in_order`: a stage waits for the next task of that order, as ranks do.
    """
    if order is not None:
        run = _run_tasks if in_order else _run_tasks_as_they_come
        return run(stage_s, hop_s, window, return_s, ready_s, order)
    num_rounds, pp_size = stage_s.shape
    hop = np.zeros(num_rounds) if hop_s is None else hop_s
    if (ready_s is None or not ready_s.any()) and (free_s is None or not free_s.any()):
        finish = _equal_stages(stage_s, hop)
        if finish is not None and (window is None or _window_is_wide(finish, stage_s, window, return_s)):
            return Timeline(finish - stage_s, finish)
    ready = np.zeros(num_rounds) if ready_s is None else ready_s
    before = np.zeros((num_rounds, pp_size))  # prefix sums of each stage's seconds, the round itself left out
    np.cumsum(stage_s[:-1], axis=0, out=before[1:])
    after = before + stage_s
    finish = np.empty_like(stage_s)
    block = num_rounds if window is None else max(1, min(window, num_rounds))
    latest = np.zeros(pp_size) if free_s is None else free_s.copy()  # finish(i-1,k) - S(i-1,k), the running maximum
    for first in range(0, num_rounds, block):
        rows = slice(first, min(first + block, num_rounds))
        earliest = ready[rows]
        if first:
            opened = finish[first - block : first - block + (rows.stop - first), -1] + return_s
            earliest = np.maximum(earliest, opened)
        for k in range(pp_size):
            lag = np.maximum.accumulate(earliest - before[rows, k])
            np.maximum(lag, latest[k], out=lag)
            latest[k] = lag[-1]
            done = lag + after[rows, k]
            finish[rows, k] = done
            earliest = done + hop[rows]
    start = finish - stage_s
    np.maximum(start[:, 0], ready, out=start[:, 0])  # which rounding may miss
    return Timeline(start, finish)


def order_of(cost: CostModel, num_rounds: int, window: int | None) -> TaskOrder | None:
    """The order in which stages of several groups run so many rounds; None where each holds one."""
    if cost.virtual_stages == 1:
        return None
    return task_order(num_rounds, cost.pp_size, cost.virtual_stages, cost.stage_order, window)


def _run_tasks(
    stage_s: Floats,
    hop_s: Floats | None,
    window: int | None,
    return_s: float,
    ready_s: Floats | None,
    order: TaskOrder,
) -> Timeline:
    """The recurrence of tasks, in lists: each depends on the one before."""
    num_rounds, num_groups = stage_s.shape
    seconds: list[list[float]] = stage_s.tolist()
    hop = [0.0] * num_rounds if hop_s is None else hop_s.tolist()
    ready = [0.0] * num_rounds if ready_s is None else ready_s.tolist()
    stages, last = order.stages, num_groups - 1
    is_handed_on = [group > 0 and stages[group] != stages[group - 1] for group in range(num_groups)]
    starts = [[0.0] * num_groups for _ in range(num_rounds)]
    left = [0.0] * num_rounds  # when each round left the last group
    reached = [0.0] * num_rounds  # when each round left the group it was in last
    free = [0.0] * (max(stages) + 1)
    for i, group in zip(order.rounds.tolist(), order.groups.tolist(), strict=True):
        stage = stages[group]
        if group:
            earliest = reached[i] + hop[i] if is_handed_on[group] else reached[i]
        else:
            earliest = ready[i]
            if window is not None and i >= window:
                earliest = max(earliest, left[i - window] + return_s)
        start = max(earliest, free[stage])
        starts[i][group] = start
        reached[i] = free[stage] = start + seconds[i][group]
        if group == last:
            left[i] = reached[i]
    start_s = np.array(starts)
    return Timeline(start_s, start_s + stage_s)


def _run_tasks_as_they_come(
    stage_s: Floats,
    hop_s: Floats | None,
    window: int | None,
    return_s: float,
    ready_s: Floats | None,
    order: TaskOrder,
) -> Timeline:
    """Tasks in time: a free stage takes the first of those that are there, by their places in the order."""
    num_rounds, num_groups = stage_s.shape
    seconds: list[list[float]] = stage_s.tolist()
    hop = [0.0] * num_rounds if hop_s is None else hop_s.tolist()
    ready = [0.0] * num_rounds if ready_s is None else np.maximum.accumulate(ready_s).tolist()
    stages, last = order.stages, num_groups - 1
    place = np.empty((num_rounds, num_groups), dtype=np.int64)
    place[order.rounds, order.groups] = np.arange(len(order.rounds))
    places = place.tolist()
    starts = [[0.0] * num_groups for _ in range(num_rounds)]
    left = [0.0] * num_rounds
    there = [0.0] * num_groups  # when the last round reached each group: rounds overtake none on a link
    free = [0.0] * (max(stages) + 1)
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in free]
    events = [(ready[i], i, 0) for i in range(num_rounds if window is None else min(window, num_rounds))]
    heapq.heapify(events)
    while events:
        now = events[0][0]
        changed = set()
        while events and events[0][0] == now:
            _, i, group = heapq.heappop(events)
            if group >= 0:
                heapq.heappush(waiting[stages[group]], (places[i][group], i, group))
                changed.add(stages[group])
            else:
                changed.add(-1 - group)  # a stage that is free again
        for stage in changed:
            if not waiting[stage] or free[stage] > now:
                continue
            _, i, group = heapq.heappop(waiting[stage])
            starts[i][group] = now
            end_s = free[stage] = now + seconds[i][group]
            heapq.heappush(events, (end_s, i, -1 - stage))
            if group < last:
                hop_here = hop[i] if stages[group + 1] != stage else 0.0
                there[group + 1] = max(end_s + hop_here, there[group + 1])
                heapq.heappush(events, (there[group + 1], i, group + 1))
            else:
                left[i] = end_s
                if window is not None and i + window < num_rounds:
                    heapq.heappush(events, (max(end_s + return_s, ready[i + window]), i + window, 0))
    start_s = np.array(starts)
    return Timeline(start_s, start_s + stage_s)


def _equal_stages(stage_s: Floats, hop_s: Floats) -> Floats | None:
    """Finishes where every round takes the same time on all stages and nothing else holds it up; None where not.

    A path to (i, k) runs through every round up to i once and through k of them once more, with their hops: the sum
    of t up to i, and k times the largest t + hop so far.
    """
    if not (stage_s == stage_s[:, :1]).all():
        return None
    seconds = stage_s[:, 0]
    slowest = np.maximum.accumulate(seconds + hop_s)
    finish: Floats = np.cumsum(seconds)[:, None] + slowest[:, None] * np.arange(stage_s.shape[1])
    return finish


def _window_is_wide(finish: Floats, stage_s: Floats, window: int, return_s: float) -> bool:
    """Whether every round has left before stage 0 would take the one that waits for it."""
    opened = finish[:-window, -1] + return_s
    return bool((opened <= finish[window:, 0] - stage_s[window:, 0]).all())


def evaluate(
    cost: CostModel,
    requests: Sequence[Request],
    rounds: Sequence[Round],
    window: int | None = None,
    round_s: Floats | None = None,
) -> Evaluation:
    """Makespan, TTFTs and bubbles of rounds; a round starts on stage 0 not before all its requests have arrived.

    round_s: seconds of each round on each stage, where they are known better than by the cost model. Where answers are
    decoded beside (`Request.output_tokens`), the timeline is that of the given rounds with what they carry; between
    them run rounds of decoded tokens alone, whenever no round has all its requests. Stages of several groups then count
    as one each.
    """
    if round_s is None and any(request.output_tokens > 1 for request in requests):
        return _evaluate_beside(cost.merged(), requests, rounds, window)
    flat = FlatRounds.of(rounds)
    prompt = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
    arrival = np.array([request.arrival_s for request in requests])
    final = flat.start + flat.tokens == prompt[flat.request]
    if round_s is None:
        round_s = cost.round_seconds(flat.round_index, flat.tokens, flat.start, final)
    ready = np.zeros(len(round_s))
    np.maximum.at(ready, flat.round_index, arrival[flat.request])
    hop = cost.hop_seconds(np.bincount(flat.round_index, weights=flat.tokens))
    order = order_of(cost, len(round_s), window)
    timeline = simulate(round_s, hop, window, cost.return_s, ready, order=order, in_order=not ready.any())
    end = np.full(len(requests), np.inf)
    end[flat.request[final]] = timeline.finish_s[flat.round_index[final], -1]
    return _evaluation(requests, end, timeline, round_s, cost.pp_size)


def _evaluate_beside(
    cost: CostModel, requests: Sequence[Request], rounds: Sequence[Round], window: int | None
) -> Evaluation:
    """Rounds one by one, with the tokens of answers that ride in them and between them."""
    clock, answers = Clock(cost, window), Answers(cost.return_s)
    ready_s = [max(requests[chunk.request].arrival_s for chunk in chunks) for chunks in rounds]
    kinds = cost.kind_of_stage
    seconds, finish = np.empty((len(rounds), cost.pp_size)), np.empty((len(rounds), cost.pp_size))
    end, busy_s, i = np.full(len(requests), np.inf), 0.0, 0
    while i < len(rounds) or answers.ready or math.isfinite(answers.next_return_s):
        now = clock.ready_s()
        next_s = ready_s[i] if i < len(rounds) else math.inf
        answers.take_back(now, requests)
        if next_s > now and not answers.ready:
            now = min(next_s, answers.next_return_s)
            answers.take_back(now, requests)
        beside = answers.beside(requests)
        chunks: Round = rounds[i] if i < len(rounds) and next_s <= now else ()
        if not chunks and not beside.tokens:
            continue
        end_s = clock.run(chunks, requests, now, beside)
        answers.depart(chunks, end_s, requests)
        own = np.array(clock.round_seconds)[kinds]
        busy_s += float(own.sum())
        if chunks:
            seconds[i], finish[i] = own, clock.finish_s
            for chunk in chunks:
                if chunk.end == requests[chunk.request].prompt_tokens:
                    end[chunk.request] = end_s
            i += 1
    tpot = [
        (answers.last_s[index] - answers.first_s[index]) / (request.output_tokens - 1)
        if request.output_tokens > 1
        else 0.0
        for index, request in enumerate(requests)
    ]
    busy_share = busy_s / (clock.finish_s[-1] * cost.pp_size) if clock.finish_s[-1] else 1.0
    return _evaluation(
        requests, end, Timeline(finish - seconds, finish), seconds, cost.pp_size, tuple(tpot), busy_share
    )


def _evaluation(
    requests: Sequence[Request],
    end: Floats,
    timeline: Timeline,
    round_s: Floats,
    num_stages: int,
    tpot_s: tuple[float, ...] = (),
    busy_share: float | None = None,
) -> Evaluation:
    """From when each request has its first token."""
    arrival = np.array([request.arrival_s for request in requests])
    ttft = end - arrival
    weights = np.array([request.weight for request in requests])
    deadline = np.array([np.inf if request.sla_ttft_s is None else request.sla_ttft_s for request in requests])
    met, has_deadline = ttft <= deadline, np.isfinite(deadline)
    if tpot_s:
        most = np.array([np.inf if request.sla_tpot_s is None else request.sla_tpot_s for request in requests])
        met &= np.array(tpot_s) <= most
        has_deadline |= np.isfinite(most)
    counted = np.where(has_deadline, weights if (weights * has_deadline).any() else 1.0, 0.0)
    makespan = timeline.makespan_s
    if busy_share is None:
        busy_share = float(round_s.sum()) / (makespan * num_stages) if makespan else 1.0
    return Evaluation(
        makespan_s=makespan,
        ttft_s=tuple(ttft.tolist()),
        mean_ttft_s=float(ttft @ weights / weights.sum()) if weights.any() else float(ttft.mean()),
        num_sla_met=int(met.sum()),
        sla_weight=float(met @ counted / counted.sum()) if counted.any() else 1.0,
        lateness_s=float((ttft - deadline).max()),
        bubble_share=max(0.0, 1.0 - busy_share),
        tpot_s=tpot_s,
        has_limits=bool(has_deadline.any()),
        timeline=timeline,
        round_s=round_s,
    )

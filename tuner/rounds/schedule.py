"""What the cost model says of rounds: their seconds, and makespan, TTFTs and bubbles by the exact recurrence
(`tuner.recurrence.timeline`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from tuner.plan.cost_model import CostModel, Ints
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import Floats
from tuner.recurrence.timeline import Timeline, order_of, simulate
from tuner.serving.answers import Answers
from tuner.serving.clock import Clock
from tuner.workload.objective import Objective

CHUNK_COLUMNS = tuple(map(attrgetter, ("request", "start", "tokens")))


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

    def sought(self, objective: Objective) -> float:
        """The figure that an objective is about: seconds, or the share of the deadlines that is met."""
        return self.sla_weight if objective is Objective.SLA else self.score(objective)[0]

    def quicker(self, times: float, requests: Sequence[Request]) -> Evaluation:
        """The same rounds of these requests, were all TTFTs and rounds so many times as short."""
        arrival = np.array([request.arrival_s for request in requests])
        return _evaluation(
            requests,
            arrival + np.array(self.ttft_s) / times,
            Timeline(self.timeline.start_s / times, self.timeline.finish_s / times),
            self.round_s / times,
            1,
            tuple(seconds / times for seconds in self.tpot_s),
            1.0 - self.bubble_share,
        )


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
        chunks = list(chain.from_iterable(rounds))
        round_index = np.repeat(np.arange(len(rounds)), [len(each) for each in rounds])
        columns = [np.fromiter(map(column, chunks), dtype=np.int64, count=len(chunks)) for column in CHUNK_COLUMNS]
        return cls(round_index, *columns)

    def tobytes(self) -> bytes:
        """The same for the same rounds."""
        return b"".join(column.tobytes() for column in (self.round_index, self.request, self.start, self.tokens))

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return int(self.round_index[-1]) + 1 if self.round_index.size else 0


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
    return RoundTimes.of(cost, requests, FlatRounds.of(rounds), round_s).evaluation(cost, requests, window)


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """What each round takes, before it is known when rounds run."""

    flat: FlatRounds
    final: npt.NDArray[np.bool_]
    """Whether a chunk ends its prompt, [num_chunks]."""
    round_s: Floats
    """[num_rounds, num_groups]."""
    hop_s: Floats
    """[num_rounds]."""

    @classmethod
    def of(
        cls, cost: CostModel, requests: Sequence[Request], flat: FlatRounds, round_s: Floats | None = None
    ) -> RoundTimes:
        """By the cost model, or `round_s` where it is known better."""
        prompt = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
        final = flat.start + flat.tokens == prompt[flat.request]
        if round_s is None:
            round_s = cost.round_seconds(flat.round_index, flat.tokens, flat.start, final)
        return cls(flat, final, round_s, cost.hop_seconds(np.bincount(flat.round_index, weights=flat.tokens)))

    def evaluation(self, cost: CostModel, requests: Sequence[Request], window: int | None) -> Evaluation:
        """By the exact recurrence."""
        flat, final, round_s = self.flat, self.final, self.round_s
        timeline = self.timeline(cost, requests, window)
        end = np.full(len(requests), np.inf)
        end[flat.request[final]] = timeline.finish_s[flat.round_index[final], -1]
        return _evaluation(requests, end, timeline, round_s, cost.pp_size)

    def timeline(self, cost: CostModel, requests: Sequence[Request], window: int | None) -> Timeline:
        """Start and finish of each round in each group."""
        arrival = np.array([request.arrival_s for request in requests])
        ready = np.zeros(len(self.round_s))
        np.maximum.at(ready, self.flat.round_index, arrival[self.flat.request])
        order = order_of(cost, len(self.round_s), window)
        return simulate(self.round_s, self.hop_s, window, cost.return_s, ready, order=order, in_order=not ready.any())

    def least_score(self, cost: CostModel, requests: Sequence[Request], objective: Objective) -> tuple[float, ...]:
        """No score of these rounds is below it: before a round ends, each stage has run its part of all up to it."""
        stage_s = np.zeros((len(self.round_s), cost.pp_size))
        for group, stage in enumerate(cost.stage_of_group):
            stage_s[:, stage] += self.round_s[:, group]
        least_s = np.cumsum(stage_s, axis=0).max(axis=1)
        end = np.full(len(requests), np.inf)
        end[self.flat.request[self.final]] = least_s[self.flat.round_index[self.final]]
        timeline = Timeline(least_s[:, None], least_s[:, None])
        return _evaluation(requests, end, timeline, self.round_s, cost.pp_size).score(objective)

    def least_makespan_s(self, cost: CostModel) -> float:
        """No makespan of these rounds is smaller, whatever the window and the order of a stage's tasks."""
        return self._least_path_s if cost.virtual_stages == 1 else self._least_work_s(cost)

    def _least_work_s(self, cost: CostModel) -> float:
        """Of stages of several groups: what a stage runs in all, behind the first round's way to its first group, and
        before the last round's way from its last one (`rounds.passes_bound`, 1.)."""
        round_s, stages = self.round_s, np.array(cost.stage_of_group)
        hops = np.concatenate([[0], np.cumsum(stages[1:] != stages[:-1])])
        before_s = np.cumsum(round_s[0]) - round_s[0] + hops * self.hop_s[0]
        after_s = np.cumsum(round_s[-1][::-1])[::-1] - round_s[-1] + (hops[-1] - hops) * self.hop_s[-1]
        busy_s = round_s.sum(axis=0)
        held = [np.flatnonzero(stages == stage) for stage in range(cost.pp_size)]
        return float(max(before_s[own[0]] + busy_s[own].sum() + after_s[own[-1]] for own in held))

    @property
    def _least_path_s(self) -> float:
        """Where each group is a stage: the longest of the paths that go along stage 0 up to a round, down with it to
        the busiest stage, along that one up to another round, and down with it to the last stage."""
        round_s, last = self.round_s, self.round_s.shape[1] - 1
        after_s = np.cumsum(round_s, axis=0)
        busiest = int(np.argmax(after_s[-1]))
        down_s = round_s[:, :busiest].sum(axis=1) + busiest * self.hop_s
        down_s += after_s[:, 0] - round_s[:, 0] - after_s[:, busiest] + round_s[:, busiest]
        out_s = round_s[:, busiest + 1 :].sum(axis=1) + (last - busiest) * self.hop_s
        out_s += after_s[:, busiest] + after_s[-1, last] - after_s[:, last]
        return float((np.maximum.accumulate(down_s) + out_s).max())


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


def measured_evaluation(requests: Sequence[Request], ttft_s: Sequence[float], makespan_s: float) -> Evaluation:
    """The figures of a run; of its rounds nothing is told."""
    arrival = np.array([request.arrival_s for request in requests])
    ended = np.array([[makespan_s]])
    return _evaluation(requests, arrival + np.array(ttft_s), Timeline(0.0 * ended, ended), ended, 1)


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

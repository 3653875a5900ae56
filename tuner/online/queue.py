"""Schedulers in simulated time, round by round, and first come first served: the loop that the field's share.

A scheduler sees only the requests that have arrived, so with arrivals the loop needs the time at which stage 0 takes
its next round; `Clock` keeps the recurrence's last finishes for that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round
from tuner.rounds.problem import Problem

Take = Callable[[int, int, int, int, bool], int]
"""(request, start, tokens it has left, tokens of room in the round, whether the round is empty) -> tokens to run."""
MOST_KEPT = 1 << 16
"""Chunk lengths and round sizes whose seconds are kept."""


@dataclass(slots=True)
class Clock:
    """The exact recurrence, one round at a time."""

    cost: CostModel
    window: int | None
    finish_s: list[float] = field(default_factory=list)
    """Last round's finish on each stage."""
    left_s: deque[float] = field(default_factory=deque)
    """Finish on the last stage of the last `window` rounds."""
    _kinds: list[int] = field(default_factory=list)
    _chunk: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    _round: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.finish_s:
            return
        self.finish_s = [0.0] * self.cost.pp_size
        self.left_s = deque(maxlen=self.window)
        self._kinds = self.cost.kind_of_stage.tolist()

    def copy(self) -> Clock:
        """The same time and costs, to look ahead."""
        other = replace(self)
        other.finish_s, other.left_s = self.finish_s.copy(), self.left_s.copy()
        return other

    def ready_s(self) -> float:
        """When stage 0 can take the next round."""
        if self.window is None or len(self.left_s) < self.window:
            return self.finish_s[0]
        return max(self.finish_s[0], self.left_s[0] + self.cost.return_s)

    def run(self, chunks: Round, requests: Sequence[Request], ready_s: float) -> float:
        """Run a round that starts on stage 0 at `ready_s` or later; return its finish on the last stage."""
        total = 0
        for chunk in chunks:
            total += chunk.tokens
        seconds = self.round_s(total).copy()
        for chunk in chunks:
            final = chunk.start + chunk.tokens == requests[chunk.request].prompt_tokens
            for i, (base_s, context_s) in enumerate(self.chunk_s(chunk.tokens)):
                seconds[i] += base_s + context_s * chunk.start
                if final:
                    seconds[i] += self.cost.kinds[i].final_s
        return self.run_seconds(seconds, total, ready_s)

    def run_seconds(self, seconds: Sequence[float], tokens: int, ready_s: float) -> float:
        """Run a round of so many tokens that takes these seconds on each kind of stage; return its last finish."""
        hop = self.cost.hop_latency_s + self.cost.hop_token_s * tokens
        earliest, finish_s = max(self.ready_s(), ready_s), self.finish_s
        for k, kind_index in enumerate(self._kinds):
            before = finish_s[k]
            done = (before if before > earliest else earliest) + seconds[kind_index]
            finish_s[k] = done
            earliest = done + hop
        self.left_s.append(done)
        return done

    def round_s(self, tokens: int) -> list[float]:
        """Overhead and token-wise seconds of a round of so many tokens on each kind of stage."""
        kept = self._round.get(tokens)
        if kept is None:
            if len(self._round) >= MOST_KEPT:
                self._round.clear()
            kept = [kind.round_overhead_s + float(kind.tokens_s(tokens)) for kind in self.cost.kinds]
            self._round[tokens] = kept
        return kept

    def chunk_s(self, tokens: int) -> list[tuple[float, float]]:
        """What a chunk of so many tokens adds on each kind of stage: seconds, and seconds a context token."""
        kept = self._chunk.get(tokens)
        if kept is None:
            if len(self._chunk) >= MOST_KEPT:
                self._chunk.clear()
            kinds = self.cost.kinds
            kept = [(float(k.attention.base(tokens)) + k.chunk_s, float(k.attention.slope(tokens))) for k in kinds]
            self._chunk[tokens] = kept
        return kept


class FirstComeQueue:
    """Rounds of at most `num_tokens` tokens, first come first served, `take` choosing each chunk.

    `one_partial`: a chunk that does not end its prompt closes the round (SGLang keeps one partial request at a time).
    Memory limits hold: a request that does not fit waits, and those behind it wait too.
    """

    def __init__(self, problem: Problem, num_tokens: int, take: Take, *, one_partial: bool = False) -> None:
        limits, self._requests = problem.limits, problem.requests
        self._budget = num_tokens if limits.max_round_tokens is None else min(num_tokens, limits.max_round_tokens)
        self._most_held = math.inf if limits.max_kv_tokens is None else limits.max_kv_tokens
        self._multiple, self._take, self._one_partial = problem.chunk_multiple, take, one_partial
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._done = [request.cached_tokens for request in problem.requests]
        self._held = 0

    @property
    def has_work(self) -> bool:
        """Whether any request that came has tokens to run."""
        return bool(self._waiting or self._running)

    def add(self, index: int, now_s: float) -> None:
        """A request has arrived."""
        self._waiting.append(index)

    def next_round(self, now_s: float) -> Round:
        """The next round; there must be work."""
        requests, done, waiting, running = self._requests, self._done, self._waiting, self._running
        chunks: list[Chunk] = []
        room, freed, place = self._budget, 0, 0
        num_running = len(running)
        while room > 0 and (place < num_running or waiting):
            is_new = place >= num_running
            index = waiting[0] if is_new else running[place]
            place += 1
            request = requests[index]
            if is_new and self._held + request.prompt_tokens > self._most_held:
                break
            left = request.prompt_tokens - done[index]
            tokens = self._take(index, done[index], left, room, not chunks)
            tokens = _on_grid(tokens, left, room, self._multiple, bool(chunks))
            if not tokens:
                if is_new:
                    break
                continue
            if is_new:
                running.append(waiting.popleft())
                self._held += request.prompt_tokens
            chunks.append(Chunk(index, done[index], tokens))
            done[index] += tokens
            room -= tokens
            if tokens == left:
                freed += request.prompt_tokens
            elif self._one_partial:
                break
        if freed:
            self._running = [index for index in running if done[index] < requests[index].prompt_tokens]
        self._held -= freed
        return tuple(chunks)


class Scheduler(Protocol):
    """Decides rounds one at a time: told of each request when it arrives, asked whenever stage 0 can take a round."""

    @property
    def has_work(self) -> bool:
        """Whether any request that came has tokens to run."""

    def add(self, index: int, now_s: float) -> None:
        """The problem's request of this index has arrived."""

    def next_round(self, now_s: float) -> Round:
        """The next round; there is work."""


def drive(problem: Problem, scheduler: Scheduler) -> list[Round]:
    """The rounds that a scheduler decides on as the problem's requests arrive, in the exact recurrence."""
    requests = problem.requests
    clock = Clock(problem.cost.merged(), problem.window)
    order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
    arrived, rounds = 0, list[Round]()
    while arrived < len(order) or scheduler.has_work:
        now = clock.ready_s()
        if not scheduler.has_work:
            now = max(now, requests[order[arrived]].arrival_s)
        while arrived < len(order) and requests[order[arrived]].arrival_s <= now:
            scheduler.add(order[arrived], now)
            arrived += 1
        chunks = scheduler.next_round(now)
        rounds.append(chunks)
        if problem.is_timed:
            clock.run(chunks, requests, now)
    return rounds


def run_queue(problem: Problem, num_tokens: int, take: Take, *, one_partial: bool = False) -> list[Round]:
    """The rounds of a `FirstComeQueue`."""
    return drive(problem, FirstComeQueue(problem, num_tokens, take, one_partial=one_partial))


def _on_grid(tokens: int, left: int, room: int, multiple: int, may_skip: bool) -> int:
    """Round a chunk down to the grid, unless it ends the prompt; the round's first chunk is never empty."""
    tokens = min(tokens, left, room)
    if tokens == left:
        return tokens
    tokens = tokens // multiple * multiple
    return tokens if tokens or may_skip else min(multiple, left, room)

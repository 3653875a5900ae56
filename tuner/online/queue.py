"""Simulates schedulers round by round; first come first served, the loop that the field's policies share.

A scheduler sees only the requests that have arrived, so with arrivals the loop needs the time at which stage 0 takes
its next round (`serving.clock`). Where answers are decoded beside prefill, every round first takes the next token of
all requests whose last one has returned, and the scheduler fills what is left of its budget: so do vLLM's V1 scheduler,
Sarathi-Serve (Agrawal and others, 2024) and SGLang's mixed chunks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tuner.plan.plan import Chunk, Round
from tuner.rounds.problem import Problem
from tuner.serving.answers import NOTHING_BESIDE, Answers, Beside
from tuner.serving.clock import Clock

Take = Callable[[int, int, int, int, bool], int]
"""(request, start, tokens it has left, tokens of room in the round, whether the round is empty) -> tokens to run."""


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

    def next_round(self, now_s: float, beside: Beside = NOTHING_BESIDE) -> Round:
        """The next round: nothing without work, and at least one step of the grid however much is decoded beside."""
        requests, done, waiting, running = self._requests, self._done, self._waiting, self._running
        multiple, take, chunks = self._multiple, self._take, list[Chunk]()
        room, freed, place = max(self._budget - beside.tokens, min(multiple, self._budget)), 0, 0
        num_running = len(running)
        while room > 0 and (place < num_running or waiting):
            is_new = place >= num_running
            index = waiting[0] if is_new else running[place]
            place += 1
            prompt, start = requests[index].prompt_tokens, done[index]
            if is_new and self._held + prompt > self._most_held:
                break
            left = prompt - start
            tokens = min(take(index, start, left, room, not chunks), left, room)
            if tokens < left:  # only what ends the prompt may be off the grid; the round's first chunk is never empty
                tokens = tokens // multiple * multiple
                if not tokens and not chunks:
                    tokens = min(multiple, left, room)
            if not tokens:
                if is_new:
                    break
                continue
            if is_new:
                running.append(waiting.popleft())
                self._held += prompt
            chunks.append(Chunk(index, start, tokens))
            done[index] = start + tokens
            room -= tokens
            if tokens == left:
                freed += prompt
            elif self._one_partial:
                break
        if freed:
            self._running = [index for index in running if done[index] < requests[index].prompt_tokens]
        self._held -= freed
        return tuple(chunks)


class Scheduler(Protocol):
    """Decides rounds one at a time: given each request when it arrives, asked whenever stage 0 can take a round."""

    @property
    def has_work(self) -> bool:
        """Whether any request that came has tokens to run."""

    def add(self, index: int, now_s: float) -> None:
        """The problem's request of this index has arrived."""

    def next_round(self, now_s: float, beside: Beside) -> Round:
        """The next round beside these decoded tokens; it holds no prompt's only where nothing has work."""


def drive(problem: Problem, scheduler: Scheduler, *, is_timed: bool = False) -> list[Round]:
    """The rounds that a scheduler decides on as the problem's requests arrive, in the exact recurrence.

    Rounds of decoded tokens alone are left out: `rounds.schedule.evaluate` finds them again. is_timed: the scheduler
    looks at the time even where all requests are there at the start.
    """
    requests = problem.requests
    clock, answers = Clock(problem.cost.merged(), problem.window), Answers(problem.cost.return_s)
    order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
    arrived, rounds = 0, list[Round]()
    while arrived < len(order) or scheduler.has_work:
        now = clock.ready_s()
        answers.take_back(now, requests)
        if not scheduler.has_work and not answers.ready:
            now = max(now, min(requests[order[arrived]].arrival_s, answers.next_return_s))
            answers.take_back(now, requests)
        while arrived < len(order) and requests[order[arrived]].arrival_s <= now:
            scheduler.add(order[arrived], requests[order[arrived]].arrival_s)
            arrived += 1
        beside = answers.beside(requests)
        if not scheduler.has_work and not beside.tokens:
            continue
        chunks = scheduler.next_round(now, beside)
        if chunks:
            rounds.append(chunks)
        if is_timed or problem.is_timed:
            answers.depart(chunks, clock.run(chunks, requests, now, beside), requests)
    return rounds


def run_queue(problem: Problem, num_tokens: int, take: Take, *, one_partial: bool = False) -> list[Round]:
    """The rounds of a `FirstComeQueue`."""
    queue = FirstComeQueue(problem, num_tokens, take, one_partial=one_partial)
    if problem.is_timed:
        return drive(problem, queue)
    for index in range(len(problem.requests)):
        queue.add(index, 0.0)
    rounds: list[Round] = []
    while queue.has_work:
        rounds.append(queue.next_round(0.0))
    return rounds

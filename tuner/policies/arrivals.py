"""Batch policies under arrivals: whenever stage 0 can take a round, all that has arrived makes a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from tuner.online.queue import drive
from tuner.plan.plan import Chunk, Round
from tuner.rounds.problem import Problem
from tuner.serving.answers import Beside

Rule = Callable[[Problem], list[Round]]


class BatchByBatch:
    """Plans what has arrived, runs it, plans what has arrived by then, and so on."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self._problem, self._rule = problem, rule
        self._here: list[int] = []
        self._rounds: deque[Round] = deque()
        # Batches alike have one plan.
        self._planned: dict[tuple[tuple[int, int, float, float | None], ...], list[Round]] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request that came has tokens to run."""
        return bool(self._here or self._rounds)

    def add(self, index: int, now_s: float) -> None:
        """A request has arrived; it waits for the next batch."""
        self._here.append(index)

    def next_round(self, now_s: float, beside: Beside) -> Round:
        """The batch's next round, whatever is decoded beside it."""
        if not self._rounds and self._here:
            batch, self._here = self._here, []
            self._rounds.extend(
                tuple(Chunk(batch[chunk.request], chunk.start, chunk.tokens) for chunk in chunks)
                for chunks in self._plan(batch)
            )
        return self._rounds.popleft() if self._rounds else ()

    def _plan(self, batch: list[int]) -> list[Round]:
        here = [self._problem.requests[index] for index in batch]
        alike = tuple((one.prompt_tokens, one.cached_tokens, one.weight, one.sla_ttft_s) for one in here)
        if alike not in self._planned:
            requests = tuple(replace(request, arrival_s=0.0, output_tokens=1) for request in here)
            self._planned[alike] = self._rule(replace(self._problem, requests=requests))
        return self._planned[alike]


def batch_by_batch(problem: Problem, rule: Rule) -> list[Round]:
    """The rounds of a batch policy as requests arrive."""
    return drive(problem, BatchByBatch(problem, rule))

"""A plan's rounds for an engine that asks, step by step, how many tokens of each request may run next."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping

from service.engines.rules import ChunkTable
from tuner.plan.plan import Plan


class PlanSteps:
    """Which requests of an engine are those of a plan, and what the step at hand may run of each.

    A request that comes stands for the first one of the plan that has its id, or else its prompt's length, and has no
    other that stands for it. The step at hand is the earliest round that a request which is there has a chunk left of:
    who is late, or was sent back, catches up first. Requests that the plan does not know wait until those that it
    knows are through, and then run in its chunk sizes, one partly done at a time. A plan serves its batch again and
    again: a request of the plan is free once the one that stood for it is gone.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._table = plan, ChunkTable.of(plan)
        self._ends: dict[int, list[int]] = defaultdict(list)
        """Of each request of the plan, where its chunks end."""
        self._rounds: dict[int, list[int]] = defaultdict(list)
        """Of each request of the plan, the rounds that its chunks are in."""
        for index, chunks in enumerate(plan.rounds):
            for chunk in chunks:
                self._ends[chunk.request].append(chunk.start + chunk.tokens)
                self._rounds[chunk.request].append(index)
        self._known: dict[str, int] = {}
        """The request of the plan that each request of the engine stands for."""
        self._round: int | None = None
        self._left = 0
        """Tokens that requests which the plan does not know may still run in the step at hand."""

    @property
    def most_tokens(self) -> int:
        """Of the largest round."""
        return max(sum(chunk.tokens for chunk in chunks) for chunks in self._plan.rounds)

    def come(self, request_id: str, prompt_tokens: int) -> None:
        """A request is there. Engines put words around the id that a caller gave: `cmpl-ID-0`."""
        taken = set(self._known.values())
        fits = [
            number
            for number, request in enumerate(self._plan.requests)
            if number not in taken and request.prompt_tokens == prompt_tokens
        ]
        named = [number for number in fits if f"-{self._plan.requests[number].id}-" in f"-{request_id}-"]
        if fits:
            self._known[request_id] = (named or fits)[0]

    def begin(self, positions: Mapping[str, int]) -> int | None:
        """Begin a step -> the round that it is, None when no request of the plan has anything of its prompt left.

        positions: of each request that is there the tokens that are in its KV cache or on their way.
        """
        self._known = {known: number for known, number in self._known.items() if known in positions}
        rounds = (self._next(number, positions[known])[0] for known, number in self._known.items())
        self._round = min((found for found in rounds if found is not None), default=None)
        self._left = 0 if self._round is not None else self._table.first
        return self._round

    def order(self, request_id: str) -> tuple[int, int]:
        """What to sort requests by, so that those of the plan are looked at first, in its order."""
        number = self._known.get(request_id)
        return (1, 0) if number is None else (0, number)

    def allowed(self, request_id: str, position: int, prompt_tokens: int) -> int:
        """Tokens of a request's prompt that the step at hand may run after `position`; 0 for none."""
        number = self._known.get(request_id)
        if number is None:
            tokens = min(self._left, self._table.size(position), prompt_tokens - position)
            self._left -= tokens
            return tokens
        found, end = self._next(number, position)
        return end - position if found is not None and found == self._round else 0

    def _next(self, number: int, position: int) -> tuple[int | None, int]:
        """The round of a request's next chunk and where it ends; (None, 0) when its prompt is through."""
        ends = self._ends[number]
        index = bisect_right(ends, position)
        return (self._rounds[number][index], ends[index]) if index < len(ends) else (None, 0)

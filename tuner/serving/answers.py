"""Answers that are decoded beside prefill: whose next token may ride in the next round, what it costs, when it is due.

A request's first token comes of its last chunk. From then on it has one token at a time in the pipeline: the next can
start once the last has left the last stage and its return has reached the first. A round takes all tokens that are
there: they are so many rows more of its token-wise work, and one call of attention over all their contexts, at what a
chunk of one token costs there (`chunk_s`, `final_s` and the kernel's shortest time once, reading a context token for
each). TPOT is the time from a request's first token to its last, over the tokens after the first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import StageCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Decoded tokens that ride in a round."""

    tokens: int = 0
    context_tokens: int = 0
    """Of all of them together."""
    due_s: float = math.inf
    """When the first of them should have left the last stage for its request to keep its TPOT limit."""
    limit_s: float = math.inf
    """The tightest of their limits."""

    def seconds(self, stage: StageCost) -> float:
        """What they add to their round on a stage, its token-wise work left out."""
        if not self.tokens:
            return 0.0
        once_s, context_s = _decode_s(stage)
        return once_s + context_s * self.context_tokens


@lru_cache(maxsize=256)
def _decode_s(stage: StageCost) -> tuple[float, float]:
    attention = stage.attention
    return float(attention.base(1)) + stage.chunk_s + stage.final_s, float(attention.slope(1))


NOTHING_BESIDE = Beside()


@dataclass(slots=True)
class Answers:
    """Requests that have their first token and are not at their last."""

    return_s: float
    """From the end of a round until the first stage can run the tokens after its own."""
    ready: list[int] = field(default_factory=list)
    """Requests whose next token waits for a round."""
    first_s: dict[int, float] = field(default_factory=dict)
    """When each request had its first token."""
    last_s: dict[int, float] = field(default_factory=dict)
    """When each request had its latest."""
    _decoded: dict[int, int] = field(default_factory=dict)
    """Tokens of each request that has some, and is not at its last."""
    _in_flight: deque[tuple[float, list[int]]] = field(default_factory=deque)

    @property
    def next_return_s(self) -> float:
        """When the first round in flight that carries one returns; infinity without one."""
        return self._in_flight[0][0] + self.return_s if self._in_flight else math.inf

    def take_back(self, now_s: float, requests: Sequence[Request]) -> None:
        """What has returned by now: those requests are at their ends, or ready for their next token."""
        while self._in_flight and self._in_flight[0][0] + self.return_s <= now_s:
            end_s, indices = self._in_flight.popleft()
            for index in indices:
                self.last_s[index] = end_s
                count = self._decoded.get(index, 0) + 1
                if count == 1:
                    self.first_s[index] = end_s
                if count < requests[index].output_tokens:
                    self._decoded[index] = count
                    self.ready.append(index)
                else:
                    self._decoded.pop(index, None)

    def beside(self, requests: Sequence[Request]) -> Beside:
        """All that are ready, for the next round."""
        if not self.ready:
            return NOTHING_BESIDE
        context, due_s, limit_s = 0, math.inf, math.inf
        for index in self.ready:
            request, count = requests[index], self._decoded[index]
            context += request.prompt_tokens + count - 1
            if request.sla_tpot_s is not None:
                due_s = min(due_s, self.first_s[index] + count * request.sla_tpot_s)
                limit_s = min(limit_s, request.sla_tpot_s)
        return Beside(tokens=len(self.ready), context_tokens=context, due_s=due_s, limit_s=limit_s)

    def depart(self, chunks: Round, end_s: float, requests: Sequence[Request]) -> None:
        """A round has started that takes all that are ready and these chunks, and ends on the last stage then."""
        ending = [
            chunk.request
            for chunk in chunks
            if requests[chunk.request].output_tokens > 1 and chunk.end == requests[chunk.request].prompt_tokens
        ]
        if self.ready or ending:
            self._in_flight.append((end_s, self.ready + ending))
            self.ready = []

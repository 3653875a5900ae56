"""First come first served: the loop that the field's schedulers share, round by round, in simulated time.

A scheduler sees only the requests that have arrived, so with arrivals the loop needs the time at which stage 0 takes
its next round; `Clock` keeps the recurrence's last finishes for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round
from tuner.rounds.problem import Problem

Take = Callable[[int, int, int, int, bool], int]
"""(request, start, tokens it has left, tokens of room in the round, whether the round is empty) -> tokens to run."""


@dataclass(slots=True)
class Clock:
    """The exact recurrence, one round at a time."""

    cost: CostModel
    window: int | None
    finish_s: list[float] = field(default_factory=list)
    """Last round's finish on each stage."""
    left_s: deque[float] = field(default_factory=deque)
    """Finish on the last stage of the last `window` rounds."""

    def __post_init__(self) -> None:
        self.finish_s = [0.0] * self.cost.pp_size
        self.left_s = deque(maxlen=self.window)

    def ready_s(self) -> float:
        """When stage 0 can take the next round."""
        if self.window is None or len(self.left_s) < self.window:
            return self.finish_s[0]
        return max(self.finish_s[0], self.left_s[0] + self.cost.return_s)

    def run(self, chunks: Round, requests: Sequence[Request], ready_s: float) -> float:
        """Run a round that starts on stage 0 at `ready_s` or later; return its finish on the last stage."""
        columns = [(chunk.tokens, chunk.start, chunk.end == requests[chunk.request].prompt_tokens) for chunk in chunks]
        total = sum(chunk.tokens for chunk in chunks)
        seconds = [kind.seconds(columns) for kind in self.cost.kinds]
        hop = self.cost.hop_latency_s + self.cost.hop_token_s * total
        earliest = max(self.ready_s(), ready_s)
        for k, kind_index in enumerate(self.cost.kind_of_stage.tolist()):
            done = max(self.finish_s[k], earliest) + seconds[kind_index]
            self.finish_s[k] = done
            earliest = done + hop
        self.left_s.append(self.finish_s[-1])
        return self.finish_s[-1]


def run_queue(problem: Problem, num_tokens: int, take: Take, *, one_partial: bool = False) -> list[Round]:
    """Make rounds of at most `num_tokens` tokens, first come first served, `take` choosing each chunk.

    `one_partial`: a chunk that does not end its prompt closes the round (SGLang keeps one partial request at a time).
    Memory limits hold: a request that does not fit waits, and those behind it wait too.
    """
    limits, multiple = problem.limits, problem.chunk_multiple
    requests = problem.requests
    budget = num_tokens if limits.max_round_tokens is None else min(num_tokens, limits.max_round_tokens)
    most_held = limits.max_kv_tokens if limits.max_kv_tokens is not None else sum(r.prompt_tokens for r in requests)
    waiting = deque(sorted(range(len(requests)), key=lambda i: requests[i].arrival_s))
    running: deque[int] = deque()
    done = [request.cached_tokens for request in requests]
    timed = problem.is_timed
    clock = Clock(problem.cost.merged(), problem.window)
    now, held, rounds = 0.0, 0, list[Round]()
    while waiting or running:
        if timed:
            now = clock.ready_s()
            if not running:
                now = max(now, requests[waiting[0]].arrival_s)
        chunks: list[Chunk] = []
        room, freed = budget, 0
        queue = [*running]
        while room > 0 and (queue or waiting):
            admitted = not queue
            index = waiting[0] if admitted else queue.pop(0)
            request = requests[index]
            if admitted and (request.arrival_s > now or held + request.prompt_tokens > most_held):
                break
            left = request.prompt_tokens - done[index]
            tokens = _on_grid(take(index, done[index], left, room, not chunks), left, room, multiple, bool(chunks))
            if not tokens:
                if admitted:
                    break
                continue
            if admitted:
                running.append(waiting.popleft())
                held += request.prompt_tokens
            chunks.append(Chunk(index, done[index], tokens))
            done[index] += tokens
            room -= tokens
            if tokens == left:
                running.remove(index)
                freed += request.prompt_tokens
            elif one_partial:
                break
        held -= freed
        rounds.append(tuple(chunks))
        if timed:
            clock.run(rounds[-1], requests, now)
    return rounds


def _on_grid(tokens: int, left: int, room: int, multiple: int, may_skip: bool) -> int:
    """Round a chunk down to the grid, unless it ends the prompt; the round's first chunk is never empty."""
    tokens = min(tokens, left, room)
    if tokens == left:
        return tokens
    tokens = tokens // multiple * multiple
    return tokens if tokens or may_skip else min(multiple, left, room)

"""Predicts the rounds that engines form from a batch by their own scheduling rules, with the plan's cost model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from db.errors import UserError
from tuner.online.queue import run_queue
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan, Round
from tuner.policies.named import base_sizes, fixed_sweep, named_rounds
from tuner.rounds.problem import Problem

LEAST_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruled:
    """Rounds that an engine makes by a rule, and how long they take by the plan's cost model."""

    rule: str
    chunk: int
    """The size that the rule is given."""
    makespan_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """Chunk sizes by the tokens before them: what one partial request at a time can be given of a plan."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan) -> ChunkTable:
        """The chunks of the request with most work: its sizes say how long rounds last at each context."""
        longest = max(range(len(plan.requests)), key=lambda index: plan.requests[index].new_tokens)
        chunks = [chunk for chunks in plan.rounds for chunk in chunks if chunk.request == longest]
        # The last chunk is what is left, not a size that was chosen.
        kept = chunks[:-1] if len(chunks) > 1 else chunks
        return cls(starts=tuple(chunk.start for chunk in kept), sizes=tuple(chunk.tokens for chunk in kept))

    @property
    def first(self) -> int:
        """Of a request's first chunk."""
        return self.sizes[0]

    def size(self, context: int) -> int:
        """Tokens of a chunk after so many."""
        return self.sizes[max(0, bisect_right(self.starts, context) - 1)]


def problem_of(plan: Plan) -> Problem:
    """The plan's batch with its cost model. Raises UserError for a plan that has none."""
    if plan.cost_model is None:
        raise UserError("plan", "without a cost model", "must be one that isochunk tune made, to be judged by")
    cost = CostModel.from_json(plan.cost_model).for_pp_size(plan.parallel.pp_size)
    # Engines cut at pages; the finest grid that any of them has.
    return Problem.of(cost, plan.requests, window=plan.window, chunk_multiple=64)


def best_fixed_chunk(problem: Problem) -> Ruled:
    """One token budget for every round: the best of the powers of two."""
    names = [name for name in fixed_sweep(problem.requests, problem.chunk_multiple) if _size(name) >= LEAST_CHUNK]
    return _best(problem, names or ["fixed:" + str(LEAST_CHUNK)])


def best_dynamic_chunk(problem: Problem, rule: str) -> Ruled:
    """An engine's dynamic chunks (`sglang`, `ascend`) from the base chunk that suits the batch best."""
    return _best(problem, [f"{rule}:{base}" for base in base_sizes(problem)])


def by_table(problem: Problem, table: ChunkTable) -> Ruled:
    """One partial request at a time, its chunks as the table says; requests behind it fill the round."""
    room = 0

    def take(index: int, start: int, left: int, room_tokens: int, first: bool) -> int:
        nonlocal room
        if first:
            fresh = start == problem.requests[index].cached_tokens
            room = table.first if fresh else table.size(start)
        tokens = min(left, room, room_tokens)
        room -= tokens
        return tokens

    rounds = run_queue(problem, max(table.sizes), take, one_partial=True)
    return Ruled(rule="the plan's chunks", chunk=table.first, makespan_s=_makespan(problem, rounds))


def _best(problem: Problem, names: Iterable[str]) -> Ruled:
    tried = [
        Ruled(rule=name, chunk=_size(name), makespan_s=_makespan(problem, named_rounds(problem, name)))
        for name in names
    ]
    return min(tried, key=lambda one: one.makespan_s)


def _makespan(problem: Problem, rounds: Sequence[Round]) -> float:
    return problem.evaluate(rounds).makespan_s


def _size(name: str) -> int:
    return int(name.partition(":")[2])

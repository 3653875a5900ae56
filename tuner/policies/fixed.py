"""`fixed:N` and `gpipe`: rounds of a token budget, first come first served."""

from __future__ import annotations

from tuner.online.queue import run_queue
from tuner.plan.plan import Round
from tuner.rounds.problem import Problem


def fixed_rounds(problem: Problem, num_tokens: int) -> list[Round]:
    """Fill each round up to `num_tokens` tokens, first come first served, the running request first.

    As vLLM (`max_num_batched_tokens`, V1 scheduler) and SGLang (`chunked_prefill_size`) pack prefill: a prompt that
    does not fit is cut at the budget and goes on first in the next round; the room after a prompt's end goes to the
    next ones.
    """

    def take(index: int, start: int, left: int, room_tokens: int, first: bool) -> int:
        return min(left, room_tokens)

    return run_queue(problem, num_tokens, take)


def gpipe_rounds(problem: Problem) -> list[Round]:
    """Run each prompt whole, one a round, in order of arrival.

    GPipe (Huang et al., 2019) cuts a mini-batch along its batch dimension and never along the sequence, so a request
    is a micro-batch. A prompt longer than a round may hold is cut there.
    """

    def take(index: int, start: int, left: int, room_tokens: int, first: bool) -> int:
        return left if first else 0

    longest = max(request.new_tokens for request in problem.requests)
    return run_queue(problem, longest, take)

"""`fixed:N` and `gpipe`: rounds of a token budget, first come first served."""

from __future__ import annotations

from tuner.plan import Round
from tuner.policies.queue import run_queue
from tuner.problem import Problem


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
    """Cut the batch into equal shares of tokens, as GPipe (Huang et al., 2019) cuts a mini-batch into micro-batches.

    GPipe finds bubbles negligible from 4 micro-batches a stage on (section 2.3), so 4 * pp_size rounds share them.
    """
    total = sum(request.new_tokens for request in problem.requests)
    share = -(-total // (4 * problem.cost.pp_size))
    return fixed_rounds(problem, -(-share // problem.chunk_multiple) * problem.chunk_multiple)

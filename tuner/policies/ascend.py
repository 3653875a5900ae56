"""`ascend`: vLLM-Ascend's profiling-based dynamic chunks with a time budget a step."""

from __future__ import annotations

import math

import numpy as np

from tuner.online.queue import run_queue
from tuner.plan.plan import Round
from tuner.rounds.problem import Problem

MIN_CHUNK = 4096
"""vLLM-Ascend's default `profiling_chunk_config.min_chunk`."""
SMOOTH_FACTOR = 1.0
"""Its default `smooth_factor`."""
NUM_SAMPLES = 64


def ascend_rounds(problem: Problem, base_tokens: int) -> list[Round]:
    """Spend a time budget a round greedily over requests, those in progress first.

    As `profiling_chunk_predictor.py` and `scheduler_profiling_chunk.py` do: prefill of several lengths up to the
    token budget is timed and fitted by f(l) = a l^2 + b l + c; a round's time budget is f(base) - f(0), the first
    chunk's. After one online refit on executed rounds (which know the context), a chunk's time is a C (C + H) + b (C
    + H) + c; here that refit is made on the cost model's own times. Each request in turn gets the chunk that spends
    what is left of the time budget (at least `min_chunk`, rounded up to 64 tokens), within the token budget, until
    either is spent. Requests that have not started take the token budget's rest, as vLLM's scheduler gives it; their
    time is charged too.
    """
    a, b, c = _refit(problem, base_tokens)
    target = _time(a, b, c, base_tokens, 0)
    align = math.lcm(64, problem.chunk_multiple) if problem.chunk_multiple < 64 else problem.chunk_multiple
    left_s = target

    def take(index: int, start: int, left: int, room_tokens: int, first: bool) -> int:
        nonlocal left_s
        if first:
            left_s = target
        if left_s <= 0.0:
            return 0
        tokens = min(left, room_tokens)
        if start > problem.requests[index].cached_tokens:
            tokens = min(tokens, _chunk(a, b, c, start, left_s, base_tokens, align))
        left_s -= _time(a, b, c, tokens, start)
        return tokens

    return run_queue(problem, base_tokens, take)


def _chunk(a: float, b: float, c: float, context: int, seconds: float, base_tokens: int, align: int) -> int:
    """Tokens whose time is `seconds`: the positive root of a C^2 + (a H + b) C + b H + c = seconds."""
    rate, rest = a * context + b, b * context + c - seconds
    if a <= 0.0 or rate * rate - 4.0 * a * rest < 0.0:
        return base_tokens
    chunk = (-rate + math.sqrt(rate * rate - 4.0 * a * rest)) / (2.0 * a)
    if chunk <= 0.0:
        return base_tokens
    smoothed = max(int(base_tokens + SMOOTH_FACTOR * (chunk - base_tokens)), min(MIN_CHUNK, base_tokens))
    return -(-smoothed // align) * align


def _time(a: float, b: float, c: float, tokens: int, context: int) -> float:
    return a * tokens * (tokens + context) + b * (tokens + context) + c


def _refit(problem: Problem, base_tokens: int) -> tuple[float, float, float]:
    """Least squares of a C (C + H) + b (C + H) + c over chunks C and contexts H as a run of the longest prompt meets
    them."""
    longest = max(request.prompt_tokens for request in problem.requests)
    chunk = np.linspace(base_tokens / 4, base_tokens, 8)
    context = np.linspace(0.0, max(longest - base_tokens, 0.0), NUM_SAMPLES // 8)
    tokens, past = (grid.ravel() for grid in np.meshgrid(chunk, context))
    stage = problem.cost.stages[0]
    seconds = stage.round_overhead_s + stage.tokens_s(tokens) + stage.chunk_seconds(tokens, past)
    columns = np.stack([tokens * (tokens + past), tokens + past, np.ones(len(tokens))], axis=1)
    scale = columns.max(axis=0)
    a, b, c = np.linalg.lstsq(columns / scale, seconds, rcond=None)[0] / scale
    return max(float(a), 1e-12), max(float(b), 1e-12), float(c)

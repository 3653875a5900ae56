"""`sglang`: SGLang's dynamic chunking (`--enable-dynamic-chunking`)."""

from __future__ import annotations

import math

import numpy as np

from tuner.online.queue import run_queue
from tuner.plan.plan import Round
from tuner.rounds.problem import Problem

SMOOTH_FACTOR = 0.75
"""SGLang's default SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR."""
NUM_SAMPLES = 128
"""Prompt lengths at which SGLang measures stage 0, up to 1.25 times the base chunk."""


def sglang_rounds(problem: Problem, base_tokens: int) -> list[Round]:
    """Chunks that keep f(L + x) - f(L) at the first chunk's, f a parabola fitted on stage 0 at context 0.

    As `scheduler_pp_mixin.py` (`profile_and_init_predictor`, `predict_next_chunk_size`) does: 128 lengths down from
    1.25 times the base chunk are timed on the first stage and fitted by f(L) = a L^2 + b L + c; after L tokens the
    next chunk solves f(L + x) - f(L) = f(base) - f(0), is pulled to base + 0.75 (x - base), floored to 64 tokens (and
    to the grid) and kept at base / 4 or more. The predicted size is the round's whole token budget, and one partial
    request at a time is in progress: it goes first, and requests behind it fill the budget.
    """
    a, b = _fit(problem, base_tokens)
    align = math.lcm(64, problem.chunk_multiple) if problem.chunk_multiple < 64 else problem.chunk_multiple

    def budget(context: int) -> int:
        if a <= 0.0:
            return base_tokens
        rate = 2.0 * a * context + b
        target = a * base_tokens**2 + b * base_tokens
        chunk = (-rate + math.sqrt(rate * rate + 4.0 * a * target)) / (2.0 * a)
        smoothed = base_tokens + SMOOTH_FACTOR * (chunk - base_tokens)
        return max(int(max(smoothed, base_tokens / 4)) // align * align, align)

    room = 0

    def take(index: int, start: int, left: int, room_tokens: int, first: bool) -> int:
        nonlocal room
        if first:
            # Only a request in progress has its chunk predicted; a fresh one opens the round with the base chunk.
            fresh = start == problem.requests[index].cached_tokens
            room = base_tokens if fresh else budget(start)
        tokens = min(left, room, room_tokens)
        room -= tokens
        return tokens

    return run_queue(problem, max(base_tokens, budget(0)), take, one_partial=True)


def _fit(problem: Problem, base_tokens: int) -> tuple[float, float]:
    """Least squares of f(L) = a L^2 + b L + c on the first stage's cost of one fresh chunk of L tokens."""
    step = base_tokens * 1.25 // NUM_SAMPLES
    lengths = np.array([n for i in range(NUM_SAMPLES) if (n := int(base_tokens * 1.25 - i * step)) > 0])
    stage = problem.cost.stages[0]
    seconds = stage.round_overhead_s + stage.tokens_s(lengths) + stage.chunk_seconds(lengths, 0)
    if len(np.unique(lengths)) < 3:
        return 0.0, 0.0
    columns = np.stack([lengths.astype(float) ** 2, lengths, np.ones(len(lengths))], axis=1)
    scale = columns.max(axis=0)
    a, b, _ = np.linalg.lstsq(columns / scale, seconds, rcond=None)[0] / scale
    return float(a), max(float(b), 0.0)

"""Ways to pack a batch beside filling rounds request after request: rounds that requests share, and caps that slope.

*Shared rounds.* Some attention kernels cost a token least in short chunks, where products want many rows. Rounds that
hold a short chunk of each of several prompts have both; a single prompt cannot.

*Sloping caps.* Where the slowest stage is a little slower than those behind it (before it), rounds may be longer the
more runs after (before) them, for the others catch up (`rounds.uneven`): a round x with Y after it adds x sum of r(j) -
(1 - r) Y at most. Long prompts, whose late chunks cannot be short, run first (last) there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tuner.plan.plan import Chunk, Request, Round
from tuner.policies.sweep import slowest_stage, work_s
from tuner.rounds.packing import Packer, pack_in_order
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work
from tuner.rounds.uneven import busiest_stage, sides_of

MOST_SHARED_UNITS = 8
"""Grid units of a short chunk, at most."""
WORTHWHILE = 0.99
"""Rounds are shared where a token costs at most so much of what it costs in the usual chunk."""
SLOPES = (0.0, 0.5, 1.0)
"""Of the slope that the proof allows."""
LEVELS = (0.4, 0.55, 0.75, 0.9, 1.0, 1.3, 1.7)
"""Of the cap that is best for all rounds: that of the outermost one."""


def short_chunks(problem: Problem, packer: Packer, cap_s: float) -> list[int]:
    """Tokens of short chunks that are worth sharing rounds for: the cheapest, and twice as many."""
    if len(problem.requests) < 2:
        return []
    stage, multiple = slowest_stage(problem), problem.chunk_multiple
    prompts = np.array([request.prompt_tokens for request in problem.requests], dtype=np.float64)
    context = float((prompts**2).sum() / prompts.sum() / 2.0)
    usual = max(packer.longest(packer.open_round(), int(context), int(prompts.max()), cap_s), multiple)
    chunks = np.unique([*(np.arange(1, MOST_SHARED_UNITS + 1) * multiple), usual])
    rate = stage.chunk_seconds(chunks, context) / chunks
    at = {int(chunk): float(each) for chunk, each in zip(chunks, rate, strict=True)}
    cheapest = min((chunk for chunk in at if chunk < usual), key=lambda chunk: at[chunk], default=usual)
    if at[cheapest] > WORTHWHILE * at[usual]:
        return []
    return [cheapest, 2 * cheapest]


def pack_shared(
    chunk_tokens: int, packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[Round]:
    """Rounds of a short chunk of each of several requests, those with most left first; longer ones where few are left.

    A round has the cap of the first request that has tokens left.
    """
    at = [request.cached_tokens for request in requests]
    rounds: list[Round] = []
    going = list(order)
    while going:
        cap_s = caps_s[going[0]]
        by_left = sorted(going, key=lambda i: at[i] - requests[i].prompt_tokens)
        tokens, chunks = chunk_tokens, _short_chunks(packer, requests, by_left, at, chunk_tokens, cap_s)
        while len(chunks) == len(going) and any(chunk.end < requests[chunk.request].prompt_tokens for chunk in chunks):
            tokens *= 2
            longer = _short_chunks(packer, requests, by_left, at, tokens, cap_s)
            if len(longer) < len(going):
                break
            chunks = longer
        if not chunks:
            first = by_left[0]
            chunks = [Chunk(first, at[first], min(packer.multiple, requests[first].prompt_tokens - at[first]))]
        for chunk in chunks:
            at[chunk.request] = chunk.end
        rounds.append(tuple(chunks))
        going = [i for i in going if at[i] < requests[i].prompt_tokens]
    return rounds


def _short_chunks(
    packer: Packer, requests: Sequence[Request], by_left: Sequence[int], at: Sequence[int], tokens: int, cap_s: float
) -> list[Chunk]:
    """A chunk of so many tokens of one request after the other while they fit under the cap."""
    filled = packer.open_round()
    for i in by_left:
        left = requests[i].prompt_tokens - at[i]
        count = min(tokens, left)
        if filled.num_tokens + count > packer.max_round_tokens or not packer.fits(
            filled, count, at[i], count == left, cap_s
        ):
            break
        packer.add(filled, i, at[i], count, count == left)
    return filled.chunks


def sloping_rounds(problem: Problem, packer: Packer, cap_s: float) -> Iterator[list[Round]]:
    """Candidates around the cap that is best for all rounds; none where stages are alike."""
    cost, work = problem.cost, work_s(problem)
    if len(cost.kinds) < 2 or len(work) < 2:
        return
    batch = Work.of(problem.requests, problem.limits.max_round_tokens)
    before, after = sides_of(cost, batch, busiest_stage(cost, batch))
    side = max(before, after, key=lambda side: len(side.ratio))
    allowed = float((1.0 - side.ratio).mean() / max(side.ratio.sum(), 1e-9))
    order = sorted(range(len(work)), key=lambda i: work[i], reverse=side is after)
    inwards = list(reversed(order)) if side is after else order  # from the end where rounds must be short
    for slope in SLOPES:
        shares, done = [0.0] * len(work), 0.0
        for i in inwards:
            shares[i] = slope * allowed * done
            done += work[i]
        for level in LEVELS:
            caps = [level * cap_s + share for share in shares]
            yield pack_in_order(packer, problem.requests, order, caps)

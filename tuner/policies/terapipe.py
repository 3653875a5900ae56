"""`terapipe`: TeraPipe's dynamic programme over token splits under a cap, one split for every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tuner.plan.plan import Chunk, Round
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.problem import Problem

MOST_UNITS = 512
"""Grid points of the longest prompt; TeraPipe uses 8 tokens of 2048, 256 points."""
NUM_CAPS = 32
"""Caps t_max that are tried; TeraPipe enumerates them all, 0.1 ms apart."""
EVEN_CHUNKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
"""Numbers of equal chunks that say which caps can still win."""
ROUNDING = 1e-12


def terapipe_rounds(problem: Problem) -> list[Round]:
    """Split the longest prompt by TeraPipe's programme; all samples share the split; a knapsack cuts the batch into
    slices.

    Li et al., 2021, sections 3.3 and 3.4: for every cap t_max, S(i) = min over chunks k of S(i - k) + t(k, i - k)
    with t <= t_max; the split with the least S + (K - 1) t_max wins. For a batch, the programme is solved for every
    number b of samples that run together, and a one-dimensional knapsack chooses the sizes b of the batch's slices.
    Samples are of equal length there; here a slice holds prompts in the order they come, each runs the shared split
    up to its own end, and the split is made for the longest prompt. Stages are taken as equal to the first one.
    """
    requests = problem.requests
    longest = max(request.new_tokens for request in requests)
    multiple = problem.chunk_multiple
    most = problem.limits.max_round_tokens or sum(request.new_tokens for request in requests)
    grid = multiple * max(1, min(-(-longest // (multiple * MOST_UNITS)), most // multiple))
    units = -(-longest // grid)
    sizes = [b for b in (1, 2, 4, 8, 16, 32) if b == 1 or (b <= len(requests) and b * grid <= most)]
    splits = {b: _best_split(problem.cost.stages[0], b, units, grid, problem) for b in sizes}
    slices = _knapsack(problem, {b: split[0] for b, split in splits.items()})
    rounds: list[Round] = []
    first = 0
    for size in slices:
        members = range(first, first + size)
        first += size
        start = 0
        for length in splits[size][1]:
            chunks = []
            for index in members:
                tokens = min(length * grid, requests[index].new_tokens - start)
                if tokens > 0:
                    chunks.append(Chunk(index, requests[index].cached_tokens + start, tokens))
            if chunks:
                rounds.append(tuple(chunks))
            start += length * grid
    return rounds


def _best_split(stage: StageCost, size: int, units: int, grid: int, problem: Problem) -> tuple[float, list[int]]:
    """(latency of one slice, chunk lengths in units) of `size` samples that run together."""
    most = problem.limits.max_round_tokens
    longest = units if most is None else max(1, min(units, most // (size * grid)))
    length = np.arange(1, longest + 1)
    start = np.arange(units)
    seconds = (
        stage.round_overhead_s
        + stage.tokens_s(size * length * grid)[:, None]
        + size * stage.chunk_seconds((length * grid)[:, None], start[None, :] * grid)
    )  # [length, start]
    least = max(float(seconds[0].max()), 1e-12)
    caps = np.geomspace(least, max(float(seconds[-1].max()), least), NUM_CAPS)
    stages_after, by_end = problem.cost.pp_size - 1, _by_end(seconds, units)
    # A split whose slowest chunk a lower cap allows is found under that one.
    free_s = next(_splits_under(by_end, units, np.array([np.inf])))[0] if stages_after else 0.0
    known_s = min(_even_split_s(seconds, units, count, stages_after) for count in EVEN_CHUNKS)
    lower = np.concatenate([[0.0], caps[:-1]])
    caps = caps[free_s + stages_after * lower <= known_s * (1.0 + ROUNDING)]
    best: tuple[float, list[int]] = (np.inf, [])
    for total, lengths in _splits_under(by_end, units, caps):
        slowest = max(float(seconds[n - 1, s]) for n, s in zip(lengths, np.cumsum([0, *lengths[:-1]]), strict=True))
        best = min(best, (total + stages_after * slowest, lengths))
    return best


def _even_split_s(seconds: Floats, units: int, count: int, stages_after: int) -> float:
    """Latency of chunks of equal length, about so many, the last one shorter."""
    length = min(-(-units // count), len(seconds))
    starts = np.arange(0, units, length)
    taken = seconds[np.minimum(units - starts, length) - 1, starts]
    return float(taken.sum() + stages_after * taken.max())


def _by_end(seconds: Floats, units: int) -> Floats:
    """Chunk times by where they end and how long they are, [units + 1, length]; infinite where none is so long."""
    lengths = np.arange(1, len(seconds) + 1)
    starts = np.arange(units + 1)[:, None] - lengths
    found: Floats = np.where(starts >= 0, seconds[lengths - 1, np.maximum(starts, 0)], np.inf)
    return found


def _splits_under(by_end: Floats, units: int, caps: Floats) -> Iterator[tuple[float, list[int]]]:
    """TeraPipe's Algorithm 1 for every cap: the least sum of chunk times, none above the cap, and its chunks."""
    rows, most = np.arange(len(caps)), caps[:, None] * (1.0 + ROUNDING)
    total = np.full((len(caps), units + 1), np.inf)
    total[:, 0] = 0.0
    choice = np.zeros((len(caps), units + 1), dtype=np.int64)
    allowed = np.isfinite(by_end) & (by_end <= most[-1])
    longest = by_end.shape[1] - np.argmax(allowed[:, ::-1], axis=1)
    for end in range(1, units + 1):
        within = int(longest[end])
        chunk = by_end[end, :within]
        sums = np.where(chunk <= most, total[:, end - within : end][:, ::-1] + chunk, np.inf)
        best = sums.argmin(axis=1)
        total[:, end], choice[:, end] = sums[rows, best], best + 1
    for row in range(len(caps)):
        lengths_taken, end = list[int](), units
        while end:
            lengths_taken.append(int(choice[row, end]))
            end -= lengths_taken[-1]
        if np.isfinite(total[row, units]):
            yield float(total[row, units]), lengths_taken[::-1]


def _knapsack(problem: Problem, latency: dict[int, float]) -> Sequence[int]:
    """Sizes of the batch's slices with the least sum of latencies, none above the KV limit."""
    requests, most = problem.requests, problem.limits.max_kv_tokens
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for count in range(1, len(requests) + 1):
        options = []
        for size, seconds in latency.items():
            held = sum(request.prompt_tokens for request in requests[max(0, count - size) : count])
            if size <= count and (most is None or held <= most):
                options.append((best[count - size][0] + seconds, [*best[count - size][1], size]))
        best.append(min(options))
    return best[-1][1]

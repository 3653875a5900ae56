"""The relaxation of a batch: what all its rounds must sum to on some stages when none exceeds a cap.

`rounds.bound` proves the makespan's bound with it; the search looks for its caps where the relaxation is least.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.plan import Request
from tuner.plan.stage_cost import Floats, PairAttention, StageCost

NUM_CAPS = 64
"""Points of the smooth curve that places the grid of caps."""
NUM_SAMPLES = 12
"""Points of a prompt at which `smooth_sums` takes the chunk length."""
MAX_CUTS = 640
"""Chunks of one request that the backward cut follows; those before them are counted as free of context reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A cost that is on no stage of a set above that stage's: linear in tokens, pair-wise in attention."""

    round_s: float
    token_s: float
    pair_s: float
    context_token_s: float
    chunk_s: float
    final_s: float
    hop_token_s: float = 0.0
    """What a token adds to its round where that is held against a cap, beside what it costs."""


@dataclass(frozen=True, slots=True)
class Work:
    """The requests as columns: what must run whatever the plan."""

    prompt: Floats
    cached: Floats
    max_round_tokens: float

    @classmethod
    def of(cls, requests: Sequence[Request], max_round_tokens: int | None) -> Work:
        """The columns of these requests."""
        prompt = np.array([request.prompt_tokens for request in requests], dtype=np.float64)
        cached = np.array([request.cached_tokens for request in requests], dtype=np.float64)
        return cls(prompt, cached, np.inf if max_round_tokens is None else float(max_round_tokens))

    @property
    def new_tokens(self) -> float:
        """Tokens that must run."""
        return float((self.prompt - self.cached).sum())


def envelopes(stages: Iterable[StageCost], work: Work, hop_token_s: float = 0.0) -> list[Envelope]:
    """Envelopes of these stages, one for each supporting line that is worth a try under their tokens tables."""
    stages = list(stages)
    pairs = [pair_floor(stage) for stage in stages]
    pair_s, context_token_s, chunk_s = (min(column) for column in zip(*pairs, strict=True))
    round_s = min(stage.round_overhead_s for stage in stages)
    final_s = min(stage.final_s for stage in stages)
    most = work.new_tokens
    points = np.array(sorted({1.0, most, *(float(n) for stage in stages for n in stage.token_count if 1 <= n < most)}))
    floor = np.min([stage.tokens_s(points) for stage in stages], axis=0)
    return [
        Envelope(
            round_s=round_s + offset,
            token_s=token_s,
            pair_s=pair_s,
            context_token_s=context_token_s,
            chunk_s=chunk_s,
            final_s=final_s,
            hop_token_s=hop_token_s,
        )
        for offset, token_s in _lines_under(points, floor)
    ]


def requests_s(line: Envelope, work: Work, num_tokens: float) -> Floats:
    """Least seconds of each request beside the rounds' overhead: cut backwards it reads its context least often."""
    prompt, cached = work.prompt, work.cached
    cuts = np.ceil((prompt - cached) / num_tokens)
    read = (cuts - 1.0) * prompt - num_tokens * cuts * (cuts - 1.0) / 2.0 + cached
    pairs = (prompt * (prompt + 1.0) - cached * (cached + 1.0)) / 2.0
    once = line.token_s * (prompt - cached) + line.pair_s * pairs + line.final_s
    seconds: Floats = once + line.context_token_s * read + line.chunk_s * cuts
    return seconds


def least_sum(envelope: Envelope, work: Work, cap_s: float = np.inf) -> float:
    """S(m) for one cap: the least that all rounds can sum to when none exceeds the cap."""
    return float(least_sums(envelope, work, np.array([cap_s]))[0][0])


def longest_round_s(envelope: Envelope, work: Work) -> float:
    """Everything in one round: no plan needs a higher cap."""
    return least_sum(envelope, work) + envelope.hop_token_s * work.new_tokens


def least_sums(envelope: Envelope, work: Work, caps_s: Floats) -> tuple[Floats, Floats]:
    """S(m) and the least number of rounds for every cap (inf where a cap is too low for any plan), both [num_caps]."""
    caps_s = caps_s * (1.0 + 1e-9)  # a higher cap only lowers the sum: rounding never makes a plan impossible
    capped_token_s = envelope.token_s + envelope.hop_token_s
    pair, context = envelope.pair_s, envelope.context_token_s
    num_caps, num_requests = len(caps_s), len(work.prompt)
    read = np.zeros(num_caps)  # context tokens read again, all requests together
    cuts = np.zeros(num_caps)
    most_cuts = np.zeros(num_caps)
    possible = caps_s >= envelope.round_s + envelope.chunk_s
    # One entry a (cap, request) pair whose cut goes on.
    cap = np.repeat(np.arange(num_caps), num_requests)
    end, start = np.tile(work.prompt, num_caps), np.tile(work.cached, num_caps)
    room = (caps_s - envelope.round_s - envelope.chunk_s)[cap]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for step in range(1, MAX_CUTS + 1):
            # The longest chunk that ends at `end`: -pair/2 c^2 + rate c <= spare; all of it, or the smaller root.
            left = end - start
            rate = (capped_token_s + 0.5 * pair - context) + pair * end
            spare = room - context * end
            whole = left * (rate - 0.5 * pair * left) <= spare
            root = 2.0 * spare / (rate + np.sqrt(np.maximum(rate * rate - 2.0 * pair * spare, 0.0)))
            chunk = np.where(whole, left, np.minimum(np.floor(root + 1e-6), left))
            end = end - chunk
            read += np.bincount(cap, weights=end, minlength=num_caps)
            cuts += np.bincount(cap, minlength=num_caps)
            most_cuts[cap] = step
            fits = chunk >= 1.0
            if np.count_nonzero(fits) < len(fits):
                possible[cap[~fits]] = False
            more = (end > start) & possible[cap]
            num_more = np.count_nonzero(more)
            if not num_more:
                break
            if num_more < len(more):
                cap, end, start, room = cap[more], end[more], start[more], room[more]
    pairs = float((work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)).sum()) / 2.0
    fixed = envelope.token_s * work.new_tokens + pair * pairs + envelope.final_s * num_requests
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        held = fixed + context * read + envelope.chunk_s * cuts
        filled = held + envelope.hop_token_s * work.new_tokens
        needed = np.where(filled > 0.0, np.ceil(filled / (caps_s - envelope.round_s) - 1e-9), 0.0)
        rounds = np.maximum(needed, most_cuts)
    possible &= np.isfinite(rounds)
    rounds = np.where(possible, np.maximum(rounds, np.ceil(work.new_tokens / work.max_round_tokens)), 0.0)
    return np.where(possible, held + envelope.round_s * rounds, np.inf), np.where(possible, rounds, np.inf)


def quick_sums(envelope: Envelope, work: Work, caps_s: Floats) -> Floats:
    """No more than `least_sums`, at once: prompts that are cut nowhere, in as many rounds as their seconds need."""
    caps_s = caps_s * (1.0 + 1e-9)
    pairs = float((work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)).sum()) / 2.0
    held = envelope.token_s * work.new_tokens + envelope.pair_s * pairs
    held += (envelope.final_s + envelope.chunk_s) * len(work.prompt) + envelope.context_token_s * float(
        work.cached.sum()
    )
    possible = caps_s >= envelope.round_s + envelope.chunk_s
    beside = np.where(possible, caps_s - envelope.round_s, np.inf)
    with np.errstate(divide="ignore"):
        rounds = np.maximum(held / beside - 1e-9, 0.0) if held > 0.0 else np.zeros_like(caps_s)
    return np.where(possible, (held + envelope.round_s * rounds) * (1.0 - 1e-9), np.inf)


def smooth_sums(envelope: Envelope, work: Work, caps_s: Floats) -> Floats:
    """S(m) without whole numbers: cuts as the integral of one over the chunk length. Not a bound; it finds good
    caps."""
    share = (np.arange(NUM_SAMPLES) + 0.5) / NUM_SAMPLES
    differing, alike = np.unique(work.prompt + 1j * work.cached, return_counts=True)
    prompt, cached = differing.real, differing.imag
    new = prompt - cached
    end = (cached[:, None] + new[:, None] * share).ravel()  # [requests that differ * samples]
    pair, context = envelope.pair_s, envelope.context_token_s
    rate = (envelope.token_s + envelope.hop_token_s - context) + pair * end
    spare = (caps_s - envelope.round_s - envelope.chunk_s)[:, None] - context * end
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        chunk = 2.0 * spare / (rate + np.sqrt(np.maximum(rate * rate - 2.0 * pair * spare, 0.0)))
    left = np.repeat(new, NUM_SAMPLES)
    chunk = np.where(np.isfinite(chunk) & (chunk > 0.0), np.minimum(chunk, left), left)
    chunk = np.where((spare > 0.0) & (chunk >= 1.0), chunk, np.nan)
    density = np.repeat(alike * new / NUM_SAMPLES, NUM_SAMPLES) / chunk  # cuts each sample stands for
    read = (density * np.maximum(end - chunk, np.repeat(cached, NUM_SAMPLES))).sum(axis=1)
    pairs = float((alike * (prompt * (prompt + 1.0) - cached * (cached + 1.0))).sum()) / 2.0
    held = envelope.token_s * work.new_tokens + pair * pairs + envelope.final_s * len(work.prompt)
    held = held + context * read + envelope.chunk_s * density.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        filled = held + envelope.hop_token_s * work.new_tokens
        sums = held + filled * envelope.round_s / (caps_s - envelope.round_s)
    return np.where(np.isfinite(sums) & (caps_s > envelope.round_s), np.maximum(sums, held + envelope.round_s), np.inf)


def likely_cap_s(envelope: Envelope, work: Work, num_more: float) -> float:
    """The cap at which the smooth S(m) + num_more * m is least."""
    caps, sums = smooth_curve(envelope, work)
    i = int(np.argmin(sums + num_more * caps))
    fine = np.linspace(caps[max(i - 1, 0)], caps[min(i + 1, len(caps) - 1)], NUM_SAMPLES)
    return float(fine[np.argmin(smooth_sums(envelope, work, fine) + num_more * fine)])


def likely_least_s(envelope: Envelope, work: Work, num_more: float) -> float:
    """The least of the smooth S(m) + num_more * m. Not a bound; it tells which line is worth a closer look."""
    caps, sums = smooth_curve(envelope, work)
    return float((sums + num_more * caps).min())


def smooth_curve(envelope: Envelope, work: Work) -> tuple[Floats, Floats]:
    """Caps over the whole range and the smooth S(m) at them."""
    highest = longest_round_s(envelope, work)
    caps = np.geomspace(max(highest * 1e-4, envelope.round_s, 1e-300), max(highest, 1e-300), NUM_CAPS)
    return caps, smooth_sums(envelope, work, caps)


def pair_floor(stage: StageCost) -> tuple[float, float, float]:
    """(pair_s, context_token_s, chunk_s) whose PairAttention cost is nowhere above the stage's attention plus
    chunk_s.

    For a table: at its points base(c) >= pair_s c (c+1) / 2 + d and slope(c) >= pair_s c + context_token_s. A chord
    lies above a convex parabola that is below its ends, and beyond the last point base and slope grow at least as
    fast, so what holds at the points holds everywhere.
    """
    attention = stage.attention
    if isinstance(attention, PairAttention):
        return attention.pair_s, attention.context_token_s, stage.chunk_s
    count = np.array(attention.count, dtype=np.float64)
    base, slope = np.array(attention.base_s), np.array(attention.context_s)
    half_square = count * (count + 1.0) / 2.0
    pair_s = float(min((base / half_square).min(), (slope / count).min()))
    context_token_s = float((slope - pair_s * count).min())
    return pair_s, max(context_token_s, 0.0), stage.chunk_s + max(float((base - pair_s * half_square).min()), 0.0)


def _lines_under(points: Floats, floor: Floats) -> list[tuple[float, float]]:
    """(offset, slope) of lines nowhere above the floor on [points[0], points[-1]], none with a negative offset.

    `floor` is a minimum of piecewise linear functions whose breaks are all among the points, so it is concave between
    them and a line below it at the points is below it between them.
    """
    slopes = {float((floor / points).min())}
    hull: list[int] = []
    x, y = points.tolist(), floor.tolist()
    for i in range(len(x)):
        while len(hull) > 1 and _turns_down(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    for left, right in itertools.pairwise(hull):
        slopes.add(float((floor[right] - floor[left]) / (points[right] - points[left])))
    lines = [(float((floor - slope * points).min()), slope) for slope in slopes]
    rounding = 1e-12 * float(floor[-1])
    allowed = sorted((max(offset, 0.0), slope) for offset, slope in lines if offset >= -rounding)
    return allowed[:: max(1, len(allowed) // 4)]


def _turns_down(x: Sequence[float], y: Sequence[float], a: int, b: int, c: int) -> bool:
    return (y[b] - y[a]) * (x[c] - x[b]) >= (y[c] - y[b]) * (x[b] - x[a])

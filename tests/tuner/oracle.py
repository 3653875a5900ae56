"""An oracle for small batches: every plan there is, by plain recursion, sharing no code with the planner.

Plans that reach the same state are compared by when each stage is free and when the last W rounds left: one that is
nowhere earlier than another cannot finish earlier (the recurrence is made of max and +), so it is not followed.
`prune=False` follows it all the same; a test compares both.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import PairAttention, StageCost, TableAttention

UNIT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    cost: CostModel
    requests: tuple[Request, ...]
    window: int | None
    chunk_multiple: int = UNIT


def random_instance(seed: int, *, most_units: int = 11) -> Instance:
    """1-3 requests of together up to `most_units` units on 2-8 stages: even and uneven, hops, windows, every cost
    term."""
    rng = random.Random(seed)
    pp_size = rng.randint(2, 8)
    num_requests = rng.randint(1, 3)
    total = rng.randint(num_requests, most_units)
    cuts = sorted(rng.sample(range(1, total), num_requests - 1))
    units = [b - a for a, b in itertools.pairwise([0, *cuts, total])]
    uneven = rng.random() < 0.5
    token_s = rng.choice([1e-5, 3e-5])
    shape = {
        "overhead": rng.choice([0.0, 0.5, 2.0, 5.0]) * UNIT * token_s,
        "pair": rng.choice([0.0, 1e-8, 5e-8]),
        "context": rng.choice([0.0, 1e-7, 2e-6]),
        "chunk": rng.choice([0.0, 0.0, 0.3 * UNIT * token_s]),
        "table": rng.random() < 0.3,
        "stairs": rng.random() < 0.3,
    }
    stage = _stage(shape, token_s, 1.0, 0.0)
    stages = [stage] * pp_size
    if uneven:
        stages = [_stage(shape, token_s, rng.uniform(0.6, 1.4), 0.0) for _ in range(pp_size)]
        if rng.random() < 0.5:
            stages[-1] = _stage(shape, token_s, rng.uniform(0.6, 1.4), 2.0 * UNIT * token_s)
    hop = rng.random() < 0.5
    cost = CostModel(
        stages=tuple(stages),
        hop_latency_s=UNIT * token_s * rng.uniform(0.0, 1.0) if hop else 0.0,
        hop_token_s=token_s * rng.uniform(0.0, 0.3) if hop else 0.0,
        return_s=UNIT * token_s * rng.uniform(0.0, 1.0) if rng.random() < 0.3 else 0.0,
    )
    requests = []
    for i, count in enumerate(units):
        cached = rng.choice([0, 0, 0, UNIT * rng.randint(1, 20)])
        short = rng.choice([0, 0, rng.randint(0, UNIT - 1)])
        requests.append(Request(id=f"r{i}", prompt_tokens=cached + count * UNIT - short, cached_tokens=cached))
    window = rng.choice([None, None, pp_size + 1, pp_size, max(1, pp_size - 2)])
    return Instance(cost=cost, requests=tuple(requests), window=window)


def best_makespan_s(instance: Instance, *, prune: bool = True) -> float:
    """The least makespan of all plans whose chunks are multiples of the unit (a prompt's last chunk may be shorter)."""
    pp_size, requests, window = instance.cost.pp_size, instance.requests, instance.window
    units = tuple(-(-r.new_tokens // instance.chunk_multiple) for r in requests)
    states = sorted(itertools.product(*(range(n + 1) for n in units)), key=sum)
    labels: dict[tuple[int, ...], list[tuple[float, ...]]] = {state: [] for state in states}
    labels[states[0]] = [(0.0,) * pp_size]  # free times of the stages, then the last rounds' finishes, oldest first
    for state in states[:-1]:
        reached = _front(labels.pop(state)) if prune else labels.pop(state)
        for target in itertools.product(*(range(a, b + 1) for a, b in zip(state, units, strict=True))):
            if target == state:
                continue
            stage_s, hop_s = _round_s(instance, state, target)
            labels[target].extend(
                _after(label, stage_s, hop_s, pp_size, window, instance.cost.return_s) for label in reached
            )
    return min(label[pp_size - 1] for label in labels[states[-1]])


def _after(
    label: tuple[float, ...], stage_s: list[float], hop_s: float, pp_size: int, window: int | None, return_s: float
) -> tuple[float, ...]:
    left = label[pp_size:]
    earliest = left[0] + return_s if window is not None and len(left) == window else 0.0
    free = []
    for k in range(pp_size):
        free.append(max(label[k], earliest) + stage_s[k])
        earliest = free[-1] + hop_s
    if window is None:
        return tuple(free)
    return (*free, *(*left, free[-1])[-window:])


def _front(labels: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Labels that no other is at or below everywhere; a shorter history waits for nothing yet."""
    kept: list[tuple[float, ...]] = []
    for label in sorted(set(labels)):
        if not any(len(a) <= len(label) and _no_later(a, label) for a in kept):
            kept.append(label)
    return kept


def _no_later(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    if len(a) == len(b):
        return all(x <= y for x, y in zip(a, b, strict=True))
    return False


def _round_s(instance: Instance, state: tuple[int, ...], target: tuple[int, ...]) -> tuple[list[float], float]:
    chunks, multiple = [], instance.chunk_multiple
    for request, before, after in zip(instance.requests, state, target, strict=True):
        done, upto = min(before * multiple, request.new_tokens), min(after * multiple, request.new_tokens)
        if upto > done:
            chunks.append((upto - done, request.cached_tokens + done, upto == request.new_tokens))
    cost = instance.cost
    hop_s = cost.hop_latency_s + cost.hop_token_s * sum(tokens for tokens, _, _ in chunks)
    return [stage.seconds(chunks) for stage in cost.stages], hop_s


def _stage(shape: dict[str, float], token_s: float, factor: float, final_s: float) -> StageCost:
    count: tuple[int, ...] = (0, UNIT, 2 * UNIT, 4 * UNIT, 16 * UNIT)
    seconds: tuple[float, ...] = tuple(n * token_s * factor for n in count)
    if shape["stairs"]:  # as kernels that work in tiles of two units
        count = tuple(n for i in range(0, 12, 2) for n in (i * UNIT + 1, (i + 2) * UNIT))
        seconds = tuple((i + 2) * UNIT * token_s * factor for i in range(0, 12, 2) for _ in range(2))
    pair, context = shape["pair"] * factor, shape["context"] * factor
    attention: PairAttention | TableAttention = PairAttention(pair_s=pair, context_token_s=context)
    if shape["table"]:
        points = (UNIT, 2 * UNIT, 4 * UNIT)
        attention = TableAttention(
            count=points,
            base_s=tuple(max(pair * n * n, token_s * UNIT * 0.2) for n in points),
            context_s=tuple(pair * n * 1.1 + context for n in points),
        )
    return StageCost(
        token_count=count,
        token_seconds=seconds,
        attention=attention,
        round_overhead_s=shape["overhead"] * factor,
        chunk_s=shape["chunk"] * factor,
        final_s=final_s,
    )

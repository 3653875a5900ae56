"""An oracle for stages of several groups: every cut of tiny prompts into rounds, and for each every order of tasks.

Tasks are appended in any order that data and KV allow, each as early as its stage can: so every order of each stage's
tasks is tried. States that ran the same tasks are compared by when stages are free and where rounds are in time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from tests.tuner.oracle import UNIT, Instance, random_instance
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_order import StageOrder

Steps = tuple[tuple[int, ...], ...]  # of each round, the units of each request


def random_passes(seed: int, *, most_units: int = 5) -> Instance:
    """An instance of `random_instance` on 1-3 stages of 1-3 groups each."""
    rng = random.Random(seed)
    drawn = random_instance(seed, most_units=most_units)
    passes, pp_size = rng.choice([1, 2, 2, 3]), rng.randint(1, 3)
    kinds = drawn.cost.stages
    if pp_size * passes > 6:
        pp_size = 2
    groups = tuple(kinds[g % len(kinds)] for g in range(pp_size * passes - 1)) + kinds[-1:]
    cost = CostModel(
        stages=groups,
        hop_latency_s=drawn.cost.hop_latency_s,
        hop_token_s=drawn.cost.hop_token_s,
        return_s=drawn.cost.return_s,
        virtual_stages=passes,
        stage_order=rng.choice(list(StageOrder)),
    )
    return Instance(cost=cost, requests=drawn.requests, window=rng.choice([None, None, 1, 2, 3]))


def best_of_all_s(instance: Instance) -> float:
    """The least makespan over all cuts and all orders."""
    units = tuple(-(-request.new_tokens // UNIT) for request in instance.requests)
    best = float("inf")
    for steps in all_steps(units):
        seconds, hops = _round_seconds(instance, steps)
        best = min(best, best_order_s(instance.cost, seconds, hops, instance.window, best))
    return best


def all_steps(units: tuple[int, ...]) -> Iterator[Steps]:
    """Every way to run so many units of each request in rounds."""
    if not any(units):
        yield ()
        return
    for step in itertools.product(*(range(n + 1) for n in units)):
        if any(step):
            for rest in all_steps(tuple(n - taken for n, taken in zip(units, step, strict=True))):
                yield (step, *rest)


def _round_seconds(instance: Instance, steps: Steps) -> tuple[list[list[float]], list[float]]:
    """[round][group] seconds and the hop of each round."""
    requests: tuple[Request, ...] = instance.requests
    cost, done = instance.cost, [request.cached_tokens for request in requests]
    seconds, hops = [], []
    for step in steps:
        chunks = []
        for index, (request, taken) in enumerate(zip(requests, step, strict=True)):
            if taken:
                end = min(done[index] + taken * UNIT, request.prompt_tokens)
                chunks.append((end - done[index], done[index], end == request.prompt_tokens))
                done[index] = end
        seconds.append([group.seconds(chunks) for group in cost.stages])
        hops.append(cost.hop_latency_s + cost.hop_token_s * sum(tokens for tokens, _, _ in chunks))
    return seconds, hops


def best_order_s(
    cost: CostModel, seconds: list[list[float]], hops: list[float], window: int | None, known_s: float
) -> float:
    """The least makespan of these rounds over all orders of tasks, or `known_s` where none is below it."""
    num_rounds, num_groups, stages = len(seconds), len(cost.stages), cost.stage_of_group
    level: dict[tuple[int, ...], list[tuple[float, ...]]] = {(0,) * num_rounds: [(0.0,) * (cost.pp_size + num_rounds)]}
    for _ in range(num_rounds * num_groups):
        reached: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
        for progress, labels in level.items():
            work = [0.0] * cost.pp_size
            for i, group in enumerate(progress):
                for g in range(group, num_groups):
                    work[stages[g]] += seconds[i][g]
            for label in labels:
                if max(free + rest for free, rest in zip(label, work, strict=False)) >= known_s:
                    continue
                for i, group in enumerate(progress):
                    if group == num_groups or (i and progress[i - 1] <= group):
                        continue
                    stage, at = stages[group], cost.pp_size + i
                    earliest = label[at] + (hops[i] if group and stages[group - 1] != stage else 0.0)
                    if group == 0 and window is not None and i >= window:
                        if progress[i - window] < num_groups:
                            continue
                        earliest = max(earliest, label[at - window] + cost.return_s)
                    end = max(earliest, label[stage]) + seconds[i][group]
                    then = list(label)
                    then[stage] = then[at] = end
                    key = (*progress[:i], group + 1, *progress[i + 1 :])
                    reached.setdefault(key, []).append(tuple(then))
        level = {key: _undominated(labels) for key, labels in reached.items()}
    finished = level.get((num_groups,) * num_rounds, [])
    return min([known_s, *(max(label) for label in finished)])


def _undominated(labels: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    kept: list[tuple[float, ...]] = []
    for label in sorted(set(labels)):
        if not any(all(a <= b for a, b in zip(other, label, strict=True)) for other in kept):
            kept.append(label)
    return kept

"""Branch and bound over layouts against planning everything, on rows of an imaginary machine."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from profiler.model import ModelShape, load_model_shape
from profiler.sequence.kind import SPKind
from tests.tuner.atom import atom
from tests.tuner.measured import Machine, measure
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rank_skew import RankSkew
from tuner.fit.rows import RankWork, Rows
from tuner.plan.cost_model import CostModel
from tuner.plan.layout import Layout, Pins, enumerate_layouts
from tuner.plan.memory import rounds_memory
from tuner.plan.plan import Request
from tuner.plan.topology import LinkSpeed, Topology
from tuner.policies.fixed import fixed_rounds
from tuner.rounds.problem import NO_LIMITS, Limits, Problem
from tuner.search.floors import Batch, Floors, least_fullest
from tuner.search.layouts import search_layouts, to_plan
from tuner.search.links import Links
from tuner.search.rules import Rules
from tuner.search.target import Room, Target, parallel_of
from tuner.workload.objective import Objective

SMALL = load_model_shape("llama-3.2-1b")
GIB = 2**30
LINKS = {
    "quick": LinkSpeed(bandwidth_gb_s=100.0, latency_us=2.0),
    "slow": LinkSpeed(bandwidth_gb_s=0.5, latency_us=50.0),
}


@cache
def rows(name: str) -> Rows:
    """Rows of the machine for a model, tensor-parallel groups of 1, 2 and 4 ranks."""
    shape = load_model_shape(name)
    found = [row for tp_size in (1, 2, 4) for row in measure(Machine(), shape=shape, tp_size=tp_size, busy_ranks=4)]
    return Rows(list({row.key: row for row in found}.values()))


@cache
def topology_of(link: str, world_size: int) -> Topology:
    return Topology(hosts=2, cards_per_host=(world_size + 1) // 2, inside_host=LINKS[link], between_hosts=LINKS["slow"])


class Fits:
    """Costs of layouts: every message by the topology's formulas."""

    def __init__(self, shape: ModelShape, link: str, world_size: int, skew: tuple[float, ...] = ()) -> None:
        self.shape, self.skew = shape, RankSkew(skew)
        self.links = Links(rows(shape.name), topology_of(link, world_size))
        self.known: dict[object, LayerCosts] = {}

    def __call__(self, layout: Layout) -> LayerCosts:
        key = (layout.tp_size, layout.sp_size, layout.sp_kind, layout.weights, layout.pp_size, layout.world_size)
        if key not in self.known:
            work = RankWork(
                shape=self.shape, dtype="float32", tp_size=layout.tp_size, sp_size=layout.sp_size,
                sp_kind=layout.sp_kind, weights=layout.weights,
            )  # fmt: skip
            found = fit_layer_costs(self.links.rows_for(layout), work, busy_ranks=layout.world_size)
            self.known[key] = replace(found, rank_skew=self.skew)
        return self.known[key]


def prompts(*lengths: int) -> tuple[Request, ...]:
    return tuple(Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(lengths))


def target_of(shape: ModelShape, requests: tuple[Request, ...], memory_bytes: int = 512 * GIB) -> Target:
    return Target(
        shape=shape, dtype="float32", requests=requests, device_type="cuda", memory_bytes=memory_bytes
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "world_size", "link", "lengths", "skew", "objective"),
    [
        ("llama-3.2-1b", 8, "quick", (4000,), (), Objective.MAKESPAN),
        ("llama-3.2-1b", 4, "slow", (6000,), (), Objective.MAKESPAN),
        ("llama-3.2-1b", 4, "quick", (6000,), (1.0, 0.9, 0.95, 0.8), Objective.MAKESPAN),
        ("qwen3-0.6b", 3, "slow", (3000, 3000), (), Objective.MAKESPAN),
        ("qwen3-0.6b", 3, "quick", (3000, 900, 900), (0.9, 1.0, 0.8), Objective.MEAN_TTFT),
        ("llama-3.2-1b", 4, "quick", (3000, 900, 900, 300), (), Objective.MEAN_TTFT),
        ("llama-3.2-1b", 2, "slow", (3000, 900), (), Objective.SLA),
        ("llama-3.2-1b", 2, "slow", (3000, 900), (), Objective.LATENESS),
        ("llama-3.2-1b", 2, "quick", (3000, 900), (), Objective.P99_TTFT),
    ],
)
def test_branch_and_bound_finds_the_best_of_planning_everything(
    name: str, world_size: int, link: str, lengths: tuple[int, ...], skew: tuple[float, ...], objective: Objective
) -> None:
    shape = load_model_shape(name)
    requests = tuple(replace(request, sla_ttft_s=0.05) for request in prompts(*lengths))
    target, rules = target_of(shape, requests), Rules(chunk_multiple=512, objective=objective)
    layouts = enumerate_layouts(shape, world_size)
    fits = Fits(shape, link, world_size, skew)
    found = search_layouts(target, layouts, rules, fits)
    everything = search_layouts(target, layouts, rules, fits, every=True)
    assert found[0].layout == everything[0].layout
    assert found[0].score(objective) == everything[0].score(objective)
    assert len(found) == len(everything) == len(layouts)
    assert not any(candidate.is_proven_worse for candidate in everything)
    for candidate in everything:  # a floor is below its layout's plan
        if candidate.rounds is not None and candidate.floor is not None:
            reached_s = candidate.score(objective)[0]
            assert candidate.floor[0] <= reached_s + 1e-9 * abs(reached_s)
    worse = {candidate.layout for candidate in found if candidate.is_proven_worse}
    estimated = {candidate.layout: candidate.likely for candidate in found if candidate.is_estimated_worse}
    for candidate in everything:
        if candidate.layout in worse | estimated.keys():
            assert candidate.score(objective) >= found[0].score(objective)
    if world_size == 8:  # most can be left out, and their estimates are near what plans reach
        assert len(estimated) > len(layouts) // 8
        reached = {candidate.layout: candidate.score(objective)[0] for candidate in everything}
        ratios = [reached[layout] / likely[0] for layout, likely in estimated.items() if likely is not None]
        assert 0.99 < min(ratios) <= np.median(ratios) < 1.06
    if (link, world_size) == ("slow", 4):
        assert len(worse) > len(layouts) // 4


@pytest.mark.parametrize("pp_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("sp_size", "kind"), [(1, SPKind.NONE), (2, SPKind.GATHER), (2, SPKind.ULYSSES)])
def test_a_floor_is_below_every_partition_and_every_fixed_chunk(pp_size: int, sp_size: int, kind: SPKind) -> None:
    """All partitions of the layers that differ much, each under plans of several chunk sizes."""
    shape = load_model_shape("llama-3.2-1b")
    skew = (1.0, 0.8, 0.9, 0.7, 0.95, 0.85, 1.0, 0.9)
    requests = prompts(5000, 700)
    batch = Batch.of(requests, None)
    layout = Layout(tp_size=1, pp_size=pp_size, sp_size=sp_size, sp_kind=kind)
    costs = Fits(shape, "slow", 8, skew)(layout)
    floor = Floors(batch, shape.num_layers).of(layout, costs)
    assert 0.0 < floor.quick_s() <= floor.close_s()
    partitions = [
        partition
        for partition in itertools.product(range(1, shape.num_layers), repeat=pp_size - 1)
        if sum(partition) < shape.num_layers
    ]
    reached = []
    for partition in partitions[:: max(1, len(partitions) // 60)]:
        whole = (*partition, shape.num_layers - sum(partition))
        cost = costs.cost_model(whole)
        reached += [_makespan_s(cost, requests, size) for size in (256, 512, 1024, 8192)]
        mean_s = _problem(cost, requests).evaluate(fixed_rounds(_problem(cost, requests), 512)).mean_ttft_s
        assert floor.score(Objective.MEAN_TTFT, close=True)[0] <= mean_s
    assert floor.close_s() <= min(reached)
    assert floor.close_s() >= 0.4 * min(reached)  # no bound of nothing
    assert 0.8 * min(reached) <= floor.likely_score(Objective.MAKESPAN)[0] <= 1.01 * min(reached)


def _problem(cost: CostModel, requests: tuple[Request, ...]) -> Problem:
    return Problem(cost=cost, requests=requests, chunk_multiple=256)


def _makespan_s(cost: CostModel, requests: tuple[Request, ...], size: int) -> float:
    problem = _problem(cost, requests)
    return problem.evaluate(fixed_rounds(problem, size)).makespan_s


def test_layers_are_dealt_out_as_well_as_by_trying_all_partitions() -> None:
    for seconds in ((1.0,), (1.0, 1.0), (1.0, 2.0), (1.0, 0.7, 0.9), (3.0, 1.0, 2.0)):
        for num_layers in range(len(seconds), 9):
            shares = itertools.product(range(num_layers + 1), repeat=len(seconds))
            best = min(
                max(layers * each for layers, each in zip(share, seconds, strict=True))
                for share in shares
                if sum(share) == num_layers
            )
            assert least_fullest(seconds, num_layers) == pytest.approx(best)


def test_weights_that_do_not_fit_are_gathered() -> None:
    """4.6 GiB of float32 weights and more on cards of 8.1 GiB, 2.6 of them the runtime's, and 8 % of nobody's."""
    target = target_of(SMALL, prompts(4000), memory_bytes=int(8.1 * GIB))
    layouts = enumerate_layouts(SMALL, 2, Pins(sp_kind=SPKind.GATHER))
    (found,) = search_layouts(target, layouts, Rules(chunk_multiple=512), Fits(SMALL, "quick", 2))
    assert str(found.layout) == "TP1 SP2 gather PP1 gathered weights"
    assert found.refusal is None
    plan = to_plan(target, found, Rules(chunk_multiple=512))
    assert plan.parallel.weights == "gathered"
    whole = search_layouts(replace(target, memory_bytes=512 * GIB), layouts, Rules(chunk_multiple=512),
                           Fits(SMALL, "quick", 2))  # fmt: skip
    assert whole[0].layout.weights == "whole"
    assert whole[0].score(Objective.MAKESPAN) <= found.score(Objective.MAKESPAN)


def test_what_memory_refuses_is_not_planned() -> None:
    target = target_of(SMALL, prompts(4000), memory_bytes=3 * GIB)
    found = search_layouts(target, enumerate_layouts(SMALL, 2), Rules(), Fits(SMALL, "quick", 2))
    assert all("needs" in (candidate.refusal or "") for candidate in found)
    assert all(candidate.rounds is None for candidate in found if candidate.layout.weights == "whole")


def test_a_plan_says_its_whole_layout_and_its_cuts() -> None:
    pins = Pins(sp_size=2, sp_kind=SPKind.GATHER, pp_size=2, virtual_stages=2)
    target, rules = target_of(SMALL, prompts(6000, 40)), Rules(chunk_multiple=256)
    candidates = search_layouts(target, enumerate_layouts(SMALL, 4, pins), rules, Fits(SMALL, "quick", 4))
    plan = to_plan(target, candidates[0], rules)
    parallel = plan.parallel
    assert (parallel.sp_size, parallel.sp_kind, parallel.pp_size, parallel.virtual_stages) == (2, "gather", 2, 2)
    assert sum(parallel.layer_partition) == SMALL.num_layers
    assert len(parallel.layer_partition) == 4
    assert len(plan.cuts) == len(plan.rounds)
    assert plan.predicted is not None and plan.predicted.lower_bound_s is not None
    assert plan.predicted.lower_bound_s <= plan.predicted.makespan_s


@pytest.mark.parametrize(
    ("lengths", "pp_size"), [((8000,) * 32, 1), ((65536,) * 32, 2), ((131071,) * 8, 1), ((16384,) * 32, 1)]
)
def test_large_batches_have_room_on_few_cards(lengths: tuple[int, ...], pp_size: int) -> None:
    """Llama-3-8B on cards of 79 GiB: rounds are limited, so that no layout is refused whose smaller rounds fit."""
    shape = replace(load_model_shape("llama-3-8b"), max_positions=1 << 20)
    target = Target(
        shape=shape, dtype="bfloat16", requests=prompts(*lengths), device_type="cuda", memory_bytes=79 * GIB
    )  # fmt: skip
    layout = Layout(tp_size=1, pp_size=pp_size)
    room = Room(target=target, layout=layout, layer_partition=(32 // pp_size,) * pp_size, chunk_multiple=256)
    limits = room.limits(NO_LIMITS)
    assert limits is not None
    assert limits.max_round_tokens is not None
    for other in room.choices(NO_LIMITS)[1:]:  # smaller rounds, so that every stage can have one
        assert pp_size > 1 and other.max_round_tokens is not None and other.max_kv_tokens is not None
        assert other.max_round_tokens < limits.max_round_tokens
        assert other.max_kv_tokens >= pp_size * other.max_round_tokens
    rounds = fixed_rounds(_limited(target.requests, limits), limits.max_round_tokens)
    assert max(sum(chunk.tokens for chunk in chunks) for chunks in rounds) <= limits.max_round_tokens
    memory = rounds_memory(
        shape, parallel_of(layout, room.layer_partition), target.requests, rounds,
        dtype="bfloat16", max_new_tokens=1, device_type="cuda",
    )  # fmt: skip
    assert target.refusal(layout, memory) is None
    # Little is left over: rounds and the prompts that are held take what there is.
    assert max(stage.total_bytes for stage in memory) > 0.5 * target.memory_bytes
    least = replace(room, target=replace(target, memory_bytes=8 * GIB))
    assert least.limits(NO_LIMITS) is None
    assert re.search(r"fit with \d+ stages on \d+ ranks", least.refusal(NO_LIMITS))


def _limited(requests: tuple[Request, ...], limits: Limits) -> Problem:
    return Problem(cost=atom(1), requests=requests, chunk_multiple=256, limits=limits)


def test_memory_limits_the_rounds_of_a_plan() -> None:
    """A batch whose one large round does not fit runs in smaller ones; with a little more memory in larger ones."""
    target, rules = target_of(SMALL, prompts(*[4000] * 12), memory_bytes=int(9.2 * GIB)), Rules(chunk_multiple=256)
    layouts, fits = enumerate_layouts(SMALL, 1), Fits(SMALL, "quick", 1)
    (found,) = search_layouts(target, layouts, rules, fits)
    (more,) = search_layouts(replace(target, memory_bytes=int(9.45 * GIB)), layouts, rules, fits)
    (free,) = search_layouts(replace(target, memory_bytes=512 * GIB), layouts, rules, fits)
    assert found.refusal is None
    assert found.peak_memory_bytes <= 0.92 * target.memory_bytes < free.peak_memory_bytes
    assert found.is_bound_by_memory
    assert free.limits is None
    assert found.limits is not None
    assert more.limits is not None
    assert (found.limits.max_round_tokens or 0) < (more.limits.max_round_tokens or 0)
    assert free.score(Objective.MAKESPAN) <= more.score(Objective.MAKESPAN) <= found.score(Objective.MAKESPAN)
    assert found.rounds is not None
    assert found.rounds.lower_bound_s <= free.score(Objective.MAKESPAN)[0]

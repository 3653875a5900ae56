"""The cut of each round: never dearer than planned, never below the floor, and what small and mixed rounds take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from db.rows.measurements import Measurement
from profiler.sequence.kind import CUTS, SequenceCut, SPKind
from tests.tuner.measured import SHAPE, Machine, measure
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.plan import Chunk, Request, Round
from tuner.rounds.schedule import evaluate
from tuner.search.cuts import choose_cuts, cut_seconds, with_cuts
from tuner.search.planner import plan_rounds

ROWS = [
    *measure(Machine(), sp_size=2),
    *(row for row in measure(Machine(), tp_size=2) if row.op in ("attention", "layer", "matmul", "elementwise")),
]
KINDS = (SPKind.GATHER, SPKind.ULYSSES, SPKind.RING)


def costs_of(kind: SPKind, rows: Sequence[Measurement] = ROWS) -> LayerCosts:
    work = RankWork(shape=SHAPE, dtype="float32", tp_size=1, sp_size=2, sp_kind=kind)
    return fit_layer_costs(rows, work, busy_ranks=2)


COSTS = {kind: costs_of(kind) for kind in KINDS}


def random_rounds(seed: int) -> tuple[tuple[Request, ...], tuple[Round, ...]]:
    """Prompts of any length, cut anyhow, several a round."""
    rng = np.random.default_rng(seed)
    requests = tuple(Request(id=str(i), prompt_tokens=int(rng.integers(1, 5000))) for i in range(6))
    done, rounds = [0] * len(requests), list[Round]()
    while any(end < request.prompt_tokens for end, request in zip(done, requests, strict=True)):
        chunks = []
        for index, request in enumerate(requests):
            left = request.prompt_tokens - done[index]
            if left and rng.random() < 0.5:
                tokens = int(rng.integers(1, left + 1)) if rng.random() < 0.7 else left
                chunks.append(Chunk(index, done[index], tokens))
                done[index] += tokens
        if chunks:
            rounds.append(tuple(chunks))
    return requests, tuple(rounds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layer_partition", [(16,), (7, 9)])
def test_no_round_takes_longer_than_planned_nor_less_than_the_floor(
    kind: SPKind, seed: int, layer_partition: tuple[int, ...]
) -> None:
    costs, (requests, rounds) = COSTS[kind], random_rounds(seed)
    planned = evaluate(costs.cost_model(layer_partition), requests, rounds)
    cuts = choose_cuts(costs, layer_partition, requests, rounds)
    seconds = cut_seconds(costs, layer_partition, requests, rounds, cuts)
    assert (seconds <= planned.round_s * (1 + 1e-12)).all()
    floor = evaluate(costs.floor_model(layer_partition), requests, rounds)
    assert (floor.round_s <= seconds * (1 + 1e-9)).all()
    for cut in CUTS[kind]:
        every = cut_seconds(costs, layer_partition, requests, rounds, [cut] * len(rounds))
        assert (floor.round_s <= every * (1 + 1e-9)).all()
    assert evaluate(costs.cost_model(layer_partition), requests, rounds, None, seconds).makespan_s <= planned.makespan_s


def test_a_round_of_few_tokens_is_left_whole_and_a_large_one_is_cut() -> None:
    # A token costs the same products on one rank as on two, and a message less.
    requests = (Request(id="a", prompt_tokens=4097),)
    rounds = ((Chunk(0, 0, 4096),), (Chunk(0, 4096, 1),))
    assert choose_cuts(COSTS[SPKind.GATHER], (16,), requests, rounds) == (SequenceCut.ZIGZAG, SequenceCut.WHOLE)


def test_many_short_prompts_are_cut_between_prompts() -> None:
    # Where calls are dear, whole prompts on each rank start a quarter as many as two blocks of each.
    costs = costs_of(SPKind.GATHER, measure(Machine(launch_us=20_000.0), sp_size=2))
    requests = tuple(Request(id=str(i), prompt_tokens=64) for i in range(32))
    rounds = (tuple(Chunk(index, 0, 64) for index in range(32)),)
    assert choose_cuts(costs, (16,), requests, rounds) == (SequenceCut.CONTIGUOUS,)


def test_a_plan_tells_the_times_of_its_cuts() -> None:
    costs = costs_of(SPKind.GATHER, measure(Machine(launch_us=20_000.0), sp_size=2))
    requests = tuple(Request(id=str(i), prompt_tokens=64) for i in range(32))
    planned = plan_rounds(costs.cost_model((16,)), requests)
    found, cuts = with_cuts(planned, costs, (16,), requests, window=None)
    assert SequenceCut.CONTIGUOUS in cuts
    assert found.makespan_s < planned.makespan_s
    cut_s = cut_seconds(costs, (16,), requests, found.rounds, cuts)
    assert found.evaluation.round_s == pytest.approx(cut_s)
    assert found.makespan_s == pytest.approx(cut_s.sum())


def test_a_layout_without_sequence_parallelism_has_one_cut() -> None:
    work = RankWork(shape=SHAPE, dtype="float32", tp_size=1)
    costs = fit_layer_costs(ROWS, work, busy_ranks=2)
    requests, rounds = random_rounds(0)
    assert set(choose_cuts(costs, (16,), requests, rounds)) == {SequenceCut.WHOLE}
    assert costs.floor_model((16,)) == costs.cost_model((16,))


def test_what_goes_to_the_next_stage_is_a_ranks_own_rows() -> None:
    costs = replace(COSTS[SPKind.GATHER], hop_byte_s=1e-9)
    cut, whole = costs.cost_model((8, 8)), costs.cost_model((8, 8), SequenceCut.WHOLE)
    assert whole.hop_token_s == 2 * cut.hop_token_s > 0

"""Training steps: orders that every stage can follow, times by the recurrence, and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from profiler.model import load_model_shape
from tests.tuner.atom import atom
from tuner.plan.plan import Chunk, Parallel, Request, Round
from tuner.training.order import Order, Recompute, most_kept, stage_tasks, step_units
from tuner.training.step import ATTENTION_BACKWARD, PRODUCTS_BACKWARD, predict_step
from tuner.training.work import StepWork, step_memory

SHAPE = load_model_shape("llama-3.2-1b")
REQUESTS = tuple(Request(id=f"r{index}", prompt_tokens=length) for index, length in enumerate((65536, 32768)))
COST = atom(1)


def layout(pp_size: int, tp_size: int = 1) -> Parallel:
    return Parallel(tp_size=tp_size, pp_size=pp_size, layer_partition=(SHAPE.num_layers // pp_size,) * pp_size)


def equal_rounds(chunks: int) -> tuple[Round, ...]:
    """Each sequence in so many chunks of as many tokens, one after another."""
    return tuple(
        (Chunk(index, number * (size := request.prompt_tokens // chunks), size),)
        for index, request in enumerate(REQUESTS)
        for number in range(chunks)
    )


def work(pp_size: int = 4, chunks: int = 4, **fields: Any) -> StepWork:
    made = StepWork(
        shape=SHAPE, parallel=layout(pp_size), requests=REQUESTS, rounds=equal_rounds(chunks), precision="bfloat16"
    )
    return replace(made, **fields)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_stage_runs_each_round_forward_before_backward(order: Order, accumulate: int) -> None:
    rounds = ((Chunk(0, 0, 9),), (Chunk(0, 9, 3), Chunk(1, 0, 4)), (Chunk(1, 4, 2),), (Chunk(2, 0, 5),))
    units = step_units(rounds, accumulate)
    assert [unit.batch for unit in units[:4]] == [0, 0, 0, 1]
    orders = []
    for stage in range(3):
        tasks = list(stage_tasks(units, stage=stage, pp_size=3, order=order))
        assert len(tasks) == 2 * len(units)
        ran: set[int] = set()
        for task in tasks:
            unit = task.unit
            if not task.is_backward:
                ran.add(unit.index)
                continue
            # A sequence's later chunks went backward before, and all of its batch forward.
            assert {other.index for other in units if other.batch == unit.batch} <= ran
        orders.append([task.unit.index for task in tasks if task.is_backward])
        assert [task.unit.index for task in tasks if not task.is_backward] == [unit.index for unit in units]
    assert orders[0] == orders[1] == orders[2]
    kept = [most_kept(units, stage=stage, pp_size=3, order=order) for stage in range(3)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == (len(units) if order is Order.ALL_FORWARD else min(len(units), kept[2] + 2))


def test_one_stage_takes_the_sum_of_its_tasks() -> None:
    one = work(pp_size=1, requests=REQUESTS[:1], rounds=((Chunk(0, 0, 8192),),))
    cost = COST
    pieces = [(8192, 0, True)]
    products = cost.without_attention().stage_seconds(0, pieces)
    attention = cost.stage_seconds(0, pieces) - products
    expected = products * (1 + PRODUCTS_BACKWARD) + attention * (1 + ATTENTION_BACKWARD)
    step = predict_step(one, cost)
    assert step.seconds == pytest.approx(expected)
    assert step.gap == pytest.approx(0.0, abs=1e-9)
    again = predict_step(work(pp_size=1, requests=REQUESTS[:1], rounds=one.rounds, recompute=Recompute.LAYER), cost)
    assert again.seconds == pytest.approx(expected + products + attention)


def test_more_chunks_fill_the_pipeline_and_no_order_beats_the_bound() -> None:
    steps = {chunks: predict_step(work(chunks=chunks), COST) for chunks in (1, 2, 4, 8)}
    assert steps[8].seconds < steps[1].seconds
    assert steps[8].bubble_share < steps[1].bubble_share
    for step in steps.values():
        assert step.lower_bound_s <= step.seconds * (1 + 1e-12)


def test_what_is_computed_again_is_not_kept() -> None:
    memories = [step_memory(work(recompute=recompute))[0] for recompute in Recompute]
    kept = [memory.kept_bytes for memory in memories]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    early, late = (step_memory(work(accumulate=4, order=order))[0] for order in reversed(Order))
    assert early.kept_bytes < late.kept_bytes
    assert early.kv_bytes < late.kv_bytes

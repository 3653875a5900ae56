"""Costs of layers within a sliding window, alone and among layers that see all: true times are known."""

from __future__ import annotations

from typing import Any

import pytest

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import ModelShape, model_from_config
from profiler.model.flops import prefill_flops
from profiler.model.whole.layer import seen_pairs
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from tests.tuner.measured import relative, row
from tuner.fit.holdout import held_out_errors
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork

WINDOW, LONGEST = 1024, 32768
PAIR_US = 2e-3


def gemma(*types: str) -> ModelShape:
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": len(types), "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "vocab_size": 262144, "max_position_embeddings": LONGEST, "sliding_window": WINDOW, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256, "layer_types": list(types), "torch_dtype": "float32",
    }  # fmt: skip
    return model_from_config(config, name="small gemma")


def measured(point: Point) -> Measurement:
    at = point.shape
    pairs = seen_pairs(at["chunk"], at["context"], at.get("window")) if "chunk" in at else 0
    work_us = {
        Op.MATMUL: lambda: 20.0 + 2.0 * at["m"] * at["n"] * at["k"] / 50e3,
        Op.ATTENTION: lambda: 20.0 + PAIR_US * pairs,
        Op.ELEMENTWISE: lambda: 5.0 + 0.5 * at["tokens"],
    }.get(point.op, lambda: 10.0)
    return row(str(point.op), work_us(), dict(at), point.group_size, point.busy_ranks, point.variant)


def fitted(shape: ModelShape, longest_prompt: int) -> tuple[LayerCosts, list[Measurement]]:
    grid = Grid(
        shape=shape, dtype="float32", tp_sizes=(1,), world_size=1, context_length=LONGEST, device_type="cpu",
        kernels=(AttentionKernel.CPU_FOLDED,),
    )  # fmt: skip
    rows = [measured(point) for point in grid.points() if point.op is not Op.LAYER]
    work = RankWork(shape=shape, dtype="float32", tp_size=1, longest_prompt=longest_prompt)
    return fit_layer_costs(rows, work, busy_ranks=1), rows


def true_attention_s(shape: ModelShape, chunk: int, context: int) -> float:
    return sum(1e-6 * (20.0 + PAIR_US * seen_pairs(chunk, context, layer.window)) for layer in shape.layers)


def test_costs_stop_growing_behind_the_window() -> None:
    shape = gemma("sliding_attention")
    costs, _ = fitted(shape, LONGEST)
    (stage,) = costs.cost_model((1,)).stages
    for chunk in (256, 1024):
        far, farther = (float(stage.chunk_seconds(chunk, context)) for context in (8192, 30000))
        assert relative(far, farther) < 0.07
        assert relative(far, true_attention_s(shape, chunk, 8192)) < 0.1
    assert prefill_flops(shape, [(256, 8192)], 0) == prefill_flops(shape, [(256, 30000)], 0)


def test_prompts_within_the_window_cost_what_full_attention_does() -> None:
    windowed, full = (fitted(gemma(f"{kind}_attention"), WINDOW)[0].cost_model((1,)) for kind in ("sliding", "full"))
    for chunk, context in ((64, 256), (256, 512)):
        found, expected = (float(cost.stages[0].chunk_seconds(chunk, context)) for cost in (windowed, full))
        assert relative(found, expected) < 0.15


@pytest.mark.parametrize("partition", [(6,), (4, 2)])
def test_a_mixed_stack_is_the_sum_of_its_layers(partition: tuple[int, ...]) -> None:
    shape = gemma(*["sliding_attention", "sliding_attention", "full_attention"] * 2)
    costs, rows = fitted(shape, LONGEST)
    cost = costs.cost_model(partition)
    for chunk in (512, 2048):
        chunks = [(chunk, context) for context in range(0, LONGEST, chunk)]
        found = sum(float(stage.chunk_seconds(*at)) for at in chunks for stage in cost.stages)
        assert relative(found, sum(true_attention_s(shape, *at) for at in chunks)) < 0.03
    held_out = {error.op: error for error in held_out_errors(rows, costs.work, busy_ranks=1)}
    assert held_out["attention"].num_points > 0

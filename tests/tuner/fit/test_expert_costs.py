"""Mixtures of experts in plans: what a rank holds and multiplies, with experts cut and spread, and what that takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import PRECISIONS, model_from_config
from profiler.model.flops import prefill_flops
from profiler.points.grid import Grid
from profiler.points.point import EVEN, SKEWED, Op, Point
from tests.tuner.measured import relative, row
from tuner.fit.holdout import held_out_errors
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.layout import Pins, enumerate_layouts
from tuner.plan.plan import Parallel

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "num_experts": 9,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "max_position_embeddings": 4096, "torch_dtype": "float32",
    "mlp_only_layers": [0],
}  # fmt: skip
SHAPE = model_from_config(CONFIG, name="mixture")
DENSE, EXPERTS = 3 * 256 * 768, 3 * 256 * 128  # numbers of an MLP, and of one expert
SKEW = 1.2  # times the even time


def measured(point: Point) -> Measurement:
    at = point.shape
    us = 10.0
    if point.op is Op.MATMUL:
        us = 20.0 + 2.0 * at["m"] * at["n"] * at["k"] / 50e3
    if point.op is Op.EXPERTS:
        mean = at["tokens"] * at["per_token"] * at["held"] / at["experts"]
        us = (50.0 + 2.0 * mean * 3 * 256 * at["features"] / 50e3) * {EVEN: 1.0, SKEWED: SKEW}[point.variant]
    if point.op is Op.ALL_REDUCE:
        us = 5.0 + at["bytes"] / 1e4
    return row(str(point.op), us, dict(at), point.group_size, point.busy_ranks, point.variant)


def test_parameters_flops_and_what_a_rank_holds() -> None:
    dense, mixed = SHAPE.layers[0], SHAPE.layers[1]
    assert (dense.kind, mixed.kind) == ("full attention", "full attention, 2 of 9 experts")
    assert mixed.num_elements() - dense.num_elements() == 9 * EXPERTS + 9 * 256 - DENSE
    assert mixed.idle_elements == 7 * EXPERTS
    token = prefill_flops(SHAPE, [(1, 0)], 0)
    attention = 3 * (256 * 64 * 8 + 4 * 64 * 256 + 2 * 4 * 64)  # matrices, and the one pair
    assert token == 2 * (attention + DENSE + 2 * (2 * EXPERTS + 9 * 256))
    plain = PRECISIONS["float32"]
    for ep_size, held in ((1, 9 * EXPERTS // 2), (2, 5 * EXPERTS)):  # half of each, or five and four of nine
        spread = mixed.spread(ep_size)
        rest = mixed.num_elements(2) - mixed.experts.matrix_elements(2) if mixed.experts else 0
        assert spread.weights_bytes(plain, 2) == 4 * (held + rest)
        assert spread.product_elements(2) == mixed.product_elements(2)
    int8 = PRECISIONS["w8a8+float32"]  # numbers of a byte, and four bytes of scale for each output of each expert
    experts = mixed.spread(2).weights_bytes(int8, 2) - replace(mixed.spread(2), mlp=dense.mlp).weights_bytes(int8, 2)
    mlp = DENSE // 2 + 4 * (768 + 256)
    assert experts == 5 * (EXPERTS + 4 * (2 * 128 + 256)) + 4 * 9 * 256 - mlp


def test_layouts_spread_experts_beside_cutting_them() -> None:
    names = [str(layout) for layout in enumerate_layouts(SHAPE, 2) if not layout.refusal]
    assert {"TP2 PP1", "TP2 EP2 PP1", "TP2 EP2 megatron PP1", "TP1 PP2"} <= set(names)
    kept = {size: {str(one) for one in enumerate_layouts(SHAPE, 2, Pins(ep_size=size))} for size in (1, 2)}
    assert kept[1] == {name for name in names if "EP" not in name}
    assert kept[2] == {name for name in names if "EP2" in name}
    with pytest.raises(UserError, match=r"^ep_size: 3; must divide tp_size = 4, whose ranks hold experts"):
        Pins(tp_size=4, ep_size=3)
    four = {str(layout) for layout in enumerate_layouts(SHAPE, 4, Pins(tp_size=4)) if not layout.refusal}
    assert {"TP4 PP1", "TP4 EP2 PP1", "TP4 EP4 PP1", "TP4 EP2 megatron PP1"} <= four
    pinned = {str(layout) for layout in enumerate_layouts(SHAPE, 4, Pins(ep_size=2, pp_size=1)) if not layout.refusal}
    assert {"TP4 EP2 PP1", "TP2 EP2 SP2 gather PP1", "TP2 EP2 all-to-all SP2 gather PP1"} <= pinned
    assert not any("EP2" not in layout for layout in pinned)
    assert "TP1 EP4 all-to-all SP4 ulysses PP1" in {str(one) for one in enumerate_layouts(SHAPE, 4, Pins(ep_size=4))}
    with pytest.raises(UserError, match=r"^ep_size: 16; at most the 9 experts of mixture"):
        enumerate_layouts(SHAPE, 16, Pins(ep_size=16, sp_size=16))
    few = model_from_config(CONFIG | {"num_experts": 3}, name="few")
    with pytest.raises(UserError, match=r"^ep_size: 4; must divide tp_size = 4, at most the 3 experts of few"):
        enumerate_layouts(few, 4, Pins(ep_size=4))
    with pytest.raises(UserError, match=r"^ep_size: 3; must divide tp_size = 2"):
        Parallel(tp_size=2, pp_size=1, ep_size=3, layer_partition=(3,))
    assert Parallel(tp_size=2, pp_size=1, ep_size=2, layer_partition=(3,)).to_json()["ep_size"] == 2
    dense = model_from_config(CONFIG | {"architectures": ["Qwen3ForCausalLM"]}, name="dense")
    assert not any("EP" in str(layout) for layout in enumerate_layouts(dense, 2))
    with pytest.raises(UserError, match=r"^ep_size: 2; 1: kernels here run no experts of dense"):
        enumerate_layouts(dense, 2, Pins(ep_size=2))


def test_experts_cost_the_mean_of_the_spreads_measured_and_tell_its_width() -> None:
    grid = Grid(
        shape=SHAPE, dtype="float32", tp_sizes=(1, 2), world_size=2, context_length=4096, device_type="cpu",
        kernels=(AttentionKernel.CPU_FOLDED,),
    )  # fmt: skip
    rows = [measured(point) for point in grid.points() if point.op is not Op.LAYER]
    for ep_size, share in ((1, 1 / 2), (2, 5 / 9)):
        work = RankWork(shape=SHAPE.spread(ep_size), dtype="float32", tp_size=2)
        costs = fit_layer_costs(rows, work, busy_ranks=2)
        experts_s = costs.others[work.shape.layers[1]].projections[-1]
        even_us = 50.0 + 2.0 * 1024 * 2 * share * EXPERTS / 50e3
        assert relative(1e6 * float(experts_s(1024)), even_us * (1 + SKEW) / 2) < 0.06
        (cost,) = costs.cost_model((3,)).stages
        (without,) = costs.changed(
            lambda kind: kind if kind.work.layer.experts is None else _without_experts(kind)
        ).cost_model((3,)).stages  # fmt: skip
        added_us = 1e6 * float(cost.tokens_s(1024) - without.tokens_s(1024))
        assert relative(added_us, 2 * 1e6 * float(experts_s(1024))) < 0.02  # two of three layers have experts
        width = {error.op: error for error in held_out_errors(rows, work, busy_ranks=2)}["experts"]
        assert width.median == pytest.approx((SKEW - 1) / (SKEW + 1), abs=0.03)


def _without_experts(costs: LayerCosts) -> LayerCosts:
    return replace(costs, projections=costs.projections[:-1])

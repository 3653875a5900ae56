"""Costs of layers that are run as wholes: a curve for each kind, summed over the layers that a stage holds."""

from __future__ import annotations

import pytest

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import Backend, ModelShape, WholeLayer, model_from_config
from profiler.points.grid import Grid
from profiler.points.point import BEFORE_LAYERS, Op, Point
from tests.tuner.measured import relative, row
from tuner.fit.rows import RankWork
from tuner.fit.whole.costs import fit_whole_costs, whole_held_out

CONTEXT, WINDOW = 8192, 512
CONFIG = {
    "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    "max_position_embeddings": CONTEXT, "sliding_window": WINDOW, "torch_dtype": "float32",
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


def shape() -> ModelShape:
    return model_from_config(CONFIG, name="ministral", backend=Backend.TRANSFORMERS)


def layer_us(layer: WholeLayer, chunk: int, context: int) -> float:
    return 50.0 + 0.5 * chunk + 1e-6 * layer.attention_flops(chunk, context)


def measured(points: list[Point], layers: list[WholeLayer]) -> list[Measurement]:
    rows = []
    for point in points:
        us = 10.0
        if point.op is Op.LAYER and point.variant != BEFORE_LAYERS:
            (layer,) = (layer for layer in layers if point.variant.endswith(layer.kind))
            us = layer_us(layer, point.shape["chunk"], point.shape["context"])
        rows.append(row(str(point.op), us, dict(point.shape), point.group_size, point.busy_ranks, point.variant))
    return rows


def test_kinds_are_summed_over_the_layers_of_a_stage() -> None:
    model = shape()
    kinds = [layer for layer in model.every_kind if isinstance(layer, WholeLayer)]
    assert [layer.window for layer in kinds] == [WINDOW, None]
    grid = Grid(
        shape=model, dtype="float32", tp_sizes=(1,), world_size=2, context_length=CONTEXT, device_type="cpu",
        kernels=(AttentionKernel.CPU_FOLDED,),
    )  # fmt: skip
    rows = measured(grid.points(), kinds)
    work = RankWork(shape=model, dtype="float32", tp_size=1)
    costs = fit_whole_costs(rows, work, busy_ranks=2)
    first, last = costs.cost_model((1, 3)).stages
    for chunk, context in ((512, 4096), (256, 7000)):
        for stage, held in ((first, kinds[:1]), (last, [kinds[1], *kinds])):
            true = 10.0 + sum(layer_us(layer, chunk, context) for layer in held)
            found = 1e6 * stage.seconds([(chunk, context, False)])
            assert relative(found, true) < 0.1
    assert relative(*(first.seconds([(512, context, False)]) for context in (2048, 7000))) < 0.1  # within its window
    assert {error.op for error in whole_held_out(rows, work, busy_ranks=2)} == {layer.kind for layer in kinds}
    alone = [one for one in rows if one.op != Op.LAYER or one.shape["chunk"] == 512]
    with pytest.raises(UserError, match="at one chunk alone; the profile ended too early"):
        fit_whole_costs(alone, work, busy_ranks=2)
    with pytest.raises(UserError, match="no layer rows for full attention of ministral"):
        fit_whole_costs([one for one in rows if not one.variant.endswith("full attention")], work, busy_ranks=2)

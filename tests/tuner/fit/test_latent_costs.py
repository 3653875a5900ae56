"""Latent attention in plans: what is counted, kept and measured, and a fit whose chunks go over latents or expanded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from db.errors import UserError
from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.measure.operations.operators import Operators
from profiler.measure.operations.workspace import Workspace
from profiler.model import PRECISIONS, Backend, ModelShape, model_from_config
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from profiler.sequence.kind import SPKind
from tests.tuner.measured import relative, row
from tests.tuner.memory_sizes import stages, whole_rounds
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.layout import check_experts_fit, check_sequence_fits
from tuner.plan.memory import rank_memory
from tuner.plan.plan import Weights

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 1000,
    "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_group": 2, "topk_group": 1, "max_position_embeddings": 4096, "torch_dtype": "float32",
}  # fmt: skip
SHAPE = model_from_config(CONFIG, name="latents")


def grid(shape: ModelShape, *, context_length: int, tp_sizes: tuple[int, ...] = (1, 2), dtype: str = "float32") -> Grid:
    return Grid(
        shape=shape, dtype=dtype, tp_sizes=tp_sizes, world_size=tp_sizes[-1], context_length=context_length,
        device_type="cpu", kernels=(AttentionKernel.CPU_FOLDED, AttentionKernel.CPU_FLASH),
    )  # fmt: skip


def test_counts_are_those_of_transformers_modules() -> None:
    whole = model_from_config(CONFIG, name="latents", backend="transformers")
    assert (SHAPE.backend, whole.backend) == (Backend.OWN, Backend.TRANSFORMERS)
    assert model_from_config(CONFIG, name="latents", device_type="cuda").backend is Backend.TRANSFORMERS
    choice = 2 * 8  # the biases of choices, which count as no parameters there
    assert SHAPE.num_parameters == whole.num_parameters + choice
    for own, other in zip(SHAPE.every_layer, whole.every_layer, strict=True):
        assert (own.kind, own.kv_numbers, own.state_numbers) == (other.kind, other.kv_numbers, other.state_numbers)
        assert own.attention_flops(37, 100) == other.attention_flops(37, 100)
        assert relative(own.product_elements(), other.product_elements()) < 1e-9
    memory = {
        tp_size: rank_memory(
            SHAPE, replace(stages(3), tp_size=tp_size), whole_rounds(100, 10, 100, 1), dtype="float32",
            device_type="cpu",
        )[0].kv_bytes
        for tp_size in (1, 2)
    }  # fmt: skip
    assert memory == dict.fromkeys((1, 2), 3 * 100 * (128 + 16) * 4)  # whole on every rank


def test_what_latents_do_not_run_in_is_refused() -> None:
    with pytest.raises(UserError, match=r"^sp_kind: gather; one of none, megatron: it runs no latent attention"):
        check_sequence_fits(SHAPE, SPKind.GATHER)
    with pytest.raises(UserError, match=r"^precision: float32\+kv-int8; one of plain keys and values: experts of"):
        check_experts_fit(SHAPE, PRECISIONS["float32+kv-int8"], Weights.WHOLE)
    with pytest.raises(UserError, match=r"kernels here run latent attention on CPUs alone"):
        model_from_config(CONFIG | {"first_k_dense_replace": 3}, name="dense", backend="own", device_type="cuda")
    scaled = {"type": "yarn", "factor": 2.0, "mscale_all_dim": "much"}
    with pytest.raises(UserError, match=r"^mscale_all_dim: much; must be a number"):
        model_from_config(CONFIG | {"rope_scaling": scaled}, name="latents", backend="own")


@pytest.mark.parametrize("dtype", ["float32", "w8a8+float32"])
def test_every_point_of_a_layer_is_run(dtype: str) -> None:
    device, precision = torch.device("cpu"), PRECISIONS[dtype]
    workspace = Workspace(device, precision, cold_bytes=0, limit_bytes=1 << 26)
    operators = Operators(SHAPE, 64, workspace, lambda _chunk, _context: AttentionKernel.CPU_FOLDED)
    wanted = (Op.ATTENTION, Op.ELEMENTWISE, Op.LAYER, Op.EXPERTS)
    all_points = grid(SHAPE, context_length=64, tp_sizes=(1, 2, 4), dtype=dtype).points()
    points = [point for point in all_points if point.op in wanted]
    ran, spreads = set(), set()
    for point in points:
        sizes = {name: size for name, size in point.shape.items() if name not in ("chunk", "tokens", "context")}
        if (work := (point.op, point.variant, *sizes.items())) not in ran:
            ran.add(work)
            width = sizes["value"] if point.op is Op.ATTENTION else 256
            assert operators.prepare(point).run(0).shape[-1] == width
        if point.op is Op.EXPERTS:
            spreads.add((sizes["held"], sizes["features"]))
    assert spreads == {(8, 64), (8, 32), (4, 64), (8, 16), (4, 32), (2, 64)}
    assert {op for op, *_ in ran} == set(wanted)
    attention = [point for point in points if point.op is Op.ATTENTION]
    assert {point.variant for point in attention} == {AttentionKernel.CPU_MASKED}
    assert {(point.shape["heads"], point.shape["kv_heads"], point.shape["latent"]) for point in attention} == {
        (8, 1, 128), (4, 1, 128), (2, 1, 128),
    }  # fmt: skip


def measured(point: Point) -> Measurement:
    """Attention in proportion to the multiplications of the way that is taken."""
    at, us = point.shape, 10.0
    if point.op is Op.ATTENTION:
        us = attention_us(at["chunk"], at["context"], at["heads"])
    return row(str(point.op), us, dict(at), point.group_size, point.busy_ranks, point.variant)


def attention_us(chunk: int, context: int, heads: int) -> float:
    latent = SHAPE.layers[0].attention.latent
    assert latent is not None
    pairs, made = chunk * context + chunk * (chunk + 1) / 2, 128 * (32 + 24)
    absorbed = chunk * made + pairs * (2 * 128 + 16)
    expanded = (chunk + context) * made + pairs * (32 + 16 + 24)
    assert latent.absorbs(chunk, context) is (absorbed < expanded)
    return 5.0 + heads * min(absorbed, expanded) / 2e4


def test_costs_follow_both_ways() -> None:
    rows = [measured(point) for point in grid(SHAPE, context_length=4096).points() if point.op is not Op.LAYER]
    costs = fit_layer_costs(rows, RankWork(shape=SHAPE, dtype="float32", tp_size=2), busy_ranks=2)
    for chunk in (16, 24, 100, 300, 1500):  # those of up to 35 tokens go over latents after a long context
        for context in (0, 700, 2300):
            predicted_us = 1e6 * float(costs.attention(chunk, context))
            assert relative(predicted_us, attention_us(chunk, context, heads=4)) < 0.03, (chunk, context)

"""What layers consist of: counted against Transformers' own models, and read by all that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from db.errors import UserError
from profiler.kernels.attention import AttentionKernel
from profiler.model import ModelShape, bundled_names, load_model_shape, precision_of
from profiler.model.flops import prefill_flops
from profiler.model.tensors import Dim
from profiler.points.grid import Grid
from profiler.points.point import Op
from runtime.stage.slab import KVSlab
from tests.checkpoints import VARIANTS
from tests.tuner.memory_sizes import stages, whole_rounds
from tuner.plan.kv_rows import KVRows
from tuner.plan.memory import rank_memory


@pytest.mark.parametrize("name", [*VARIANTS, *bundled_names()])
def test_parameters_are_those_of_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = load_model_shape(str(checkpoint(name)) if name in VARIANTS else name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    of_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert shape.layer.num_elements() == of_layer


def uneven() -> ModelShape:
    """Llama-3.2-1B with half the MLP and a quarter of the KV heads in its first layer."""
    shape = load_model_shape("llama-3.2-1b")
    first, half = shape.layers[0], Dim(4096)
    q, k, v = first.attention.qkv.parts
    k, v = (replace(part, rows=Dim(2, 64)) for part in (k, v))
    attention = replace(
        first.attention, kv_heads=Dim(2, 64), qkv=replace(first.attention.qkv, parts=(q, k, v))
    )  # fmt: skip
    gate_up = replace(first.mlp.gate_up, parts=tuple(replace(part, rows=half) for part in first.mlp.gate_up.parts))
    mlp = replace(first.mlp, gate_up=gate_up, down=replace(first.mlp.down, inputs=half))
    return replace(shape, every_layer=(replace(first, attention=attention, mlp=mlp), *shape.layers[1:]))


def test_layers_that_differ_are_counted_one_by_one() -> None:
    even, shape = load_model_shape("llama-3.2-1b"), uneven()
    mlp, kv = 3 * 2048 * 4096, 2 * 6 * 64  # what the first layer lacks
    assert even.num_parameters - shape.num_parameters == mlp + kv * 2048
    assert prefill_flops(even, [(10, 5)], 1) - prefill_flops(shape, [(10, 5)], 1) == 2 * 10 * (mlp + kv * 2048)

    def memory(shape: ModelShape) -> list[tuple[int, int]]:
        counted = rank_memory(shape, stages(8, 8), whole_rounds(100, 10, 100, 1), dtype="bfloat16", device_type="cpu")
        return [(stage.weights_bytes, stage.kv_bytes) for stage in counted]

    (weights, kv_bytes), last = memory(even)
    assert memory(shape) == [(weights - 2 * (mlp + kv * 2048), kv_bytes - 2 * 100 * kv), last]
    heads = [(layer.attention.kv_heads.count, layer.attention.kept_widths) for layer in shape.layers[:8]]
    slab = KVSlab(heads, KVRows(start=(0,), total=100), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert sum(part.nbytes for part in (*slab.keys, *slab.values)) == kv_bytes - 2 * 100 * kv


def test_layers_that_differ_are_all_profiled_but_have_no_one_time() -> None:
    grid = Grid(
        shape=uneven(), dtype="bfloat16", tp_sizes=(1,), world_size=1, context_length=1024, device_type="cpu",
        kernels=(AttentionKernel.CPU_FLASH,),
    )  # fmt: skip
    assert {point.shape["intermediate"] for point in grid.points() if point.op is Op.LAYER} == {4096, 8192}
    with pytest.raises(UserError, match=r"^MODEL: llama-3.2-1b; has 2 kinds of layers"):
        _ = uneven().layer


def test_all_reduces_of_a_layer() -> None:
    layer = load_model_shape("llama-3-8b").layer
    assert layer.reduced_bytes(precision_of("bfloat16")) == (8192, 8192)


def test_norms_over_all_heads_take_an_all_reduce_of_two_sums(checkpoint: Callable[[str], Path]) -> None:
    layer = load_model_shape(str(checkpoint("olmo2"))).layer
    assert layer.variant == "post-norm+qk-norm-all-heads"
    assert layer.reduced_bytes(precision_of("bfloat16")) == (8, 128, 128)

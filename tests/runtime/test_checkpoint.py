"""Ranks read only their slices, and together they read the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from profiler.model import load_model_shape
from runtime.checkpoint import ALL, Checkpoint, RandomWeights, tensor_shapes
from runtime.place import Place
from runtime.shard import _kv_rows, _share
from tests.checkpoints import VARIANTS
from tuner.plan import Parallel

CPU = torch.device("cpu")


def _place(tp_rank: int, tp_size: int) -> Place:
    return Place(stage=0, tp_rank=tp_rank, parallel=Parallel(tp_size=tp_size, pp_size=1, layer_partition=(5,)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_and_shapes_are_those_of_the_file(variant: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(variant)
    stored = {name: tuple(t.shape) for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert tensor_shapes(load_model_shape(str(folder))) == stored


def test_a_slice_opens_one_file_and_is_converted(checkpoint: Callable[[str], Path]) -> None:
    folder, name = checkpoint("llama"), "model.layers.3.mlp.down_proj.weight"
    weights = Checkpoint(folder, device=CPU, dtype=torch.bfloat16)
    whole = load_file(folder / weights.file_of[name])[name]
    part = weights.read(name, ALL, slice(28, 56))
    assert part.dtype is torch.bfloat16
    assert part.is_contiguous()
    torch.testing.assert_close(part, whole[:, 28:56].bfloat16())
    assert list(weights._open) == [weights.file_of[name]]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_shares_cover_a_vocabulary_that_tp_size_does_not_divide(tp_size: int) -> None:
    parts = [_share(211, _place(rank, tp_size)) for rank in range(tp_size)]
    assert [index for part in parts for index in range(211)[part]] == list(range(211))
    assert {part.stop - part.start for part in parts} <= {211 // tp_size, 211 // tp_size + 1}


@pytest.mark.parametrize(
    ("variant", "tp_size", "heads"),
    [
        ("qwen3", 2, [(0, 1), (2, 3)]),
        ("llama", 2, [(0,), (1,)]),
        ("llama", 4, [(0,), (0,), (1,), (1,)]),
        ("llama-bias-one-kv-head", 4, [(0,), (0,), (0,), (0,)]),
    ],
)
def test_kv_heads_are_shared_when_there_are_fewer_than_ranks(
    variant: str, tp_size: int, heads: list[tuple[int, ...]], checkpoint: Callable[[str], Path]
) -> None:
    shape = load_model_shape(str(checkpoint(variant)))
    for rank, expected in enumerate(heads):
        rows = _kv_rows(shape, _place(rank, tp_size))
        assert sorted({row // shape.head_dim for row in range(rows.start, rows.stop)}) == list(expected)


def test_random_weights_are_the_same_for_the_same_slice(checkpoint: Callable[[str], Path]) -> None:
    shape = load_model_shape(str(checkpoint("qwen2")))
    one, other = (RandomWeights(shape, device=CPU, dtype=torch.float32) for _ in range(2))
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(one.read(name, slice(0, 16)), other.read(name, slice(0, 16)))
    assert not torch.equal(one.read(name, slice(0, 16)), one.read(name, slice(16, 32)))
    assert one.read(name, slice(0, 16)).shape == (16, 64)
    assert one.read("model.norm.weight").eq(1).all()

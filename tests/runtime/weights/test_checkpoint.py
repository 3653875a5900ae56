"""Ranks read only their slices, and together they read the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from profiler.model import load_model_shape
from runtime.weights.checkpoint import ALL, Checkpoint, RandomWeights
from tests.checkpoints import VARIANTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_names_and_shapes_are_those_of_the_file(variant: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(variant)
    stored = {name: tuple(t.shape) for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert load_model_shape(str(folder)).tensors() == stored


def test_a_slice_opens_one_file_and_is_converted(checkpoint: Callable[[str], Path]) -> None:
    folder, name = checkpoint("llama"), "model.layers.3.mlp.down_proj.weight"
    weights = Checkpoint(folder, device=CPU, dtype=torch.bfloat16)
    whole = load_file(folder / weights.file_of[name])[name]
    part = weights.read(name, ALL, slice(28, 56))
    assert part.dtype is torch.bfloat16
    assert part.is_contiguous()
    torch.testing.assert_close(part, whole[:, 28:56].bfloat16())
    assert list(weights._open) == [weights.file_of[name]]


def test_random_weights_are_the_same_for_the_same_slice(checkpoint: Callable[[str], Path]) -> None:
    shape = load_model_shape(str(checkpoint("qwen2")))
    one, other = (RandomWeights(shape, device=CPU, dtype=torch.float32) for _ in range(2))
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(one.read(name, slice(0, 16)), other.read(name, slice(0, 16)))
    assert not torch.equal(one.read(name, slice(0, 16)), one.read(name, slice(16, 32)))
    assert one.read(name, slice(0, 16)).shape == (16, 64)
    assert one.read("model.norm.weight").eq(1).all()

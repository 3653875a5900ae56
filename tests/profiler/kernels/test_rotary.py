"""Frequencies are those of Transformers to the last bit, from newer and older spellings of a configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from profiler.kernels.rotary import Rotary
from profiler.model import model_from_config
from profiler.model.rope import WHOLE_HEADS
from tests.checkpoints import LLAMA3_ROPE

SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 256,
    "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
    "max_position_embeddings": 131072,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

KIMI = YARN | {
    "rope_theta": 5e4,
    "factor": 32.0,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {name: LLAMA3_ROPE[name] for name in LLAMA3_ROPE if name != "rope_theta"},
        },
        {"rope_parameters": dict(LLAMA3_ROPE) | {"rope_theta": 1e6, "original_max_position_embeddings": 8192}},
        {"rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False, "attention_factor": 1.2}},
        {"rope_parameters": KIMI},
        {"rope_parameters": KIMI | {"mscale": 0.707, "beta_fast": 32}},
    ],
)
def test_cosines_equal_transformers(config: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = model_from_config(SIZES | config, name="test")
    positions = torch.tensor([0, 1, 77, 4096, 131071])
    cos, sin = Rotary(shape, torch.device("cpu"))(positions, torch.float32)[WHOLE_HEADS]
    reference = LlamaRotaryEmbedding(LlamaConfig(**SIZES | config))
    expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
    half = cos.shape[-1]
    torch.testing.assert_close(cos, expected_cos[0, :, :half], rtol=0, atol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, :half], rtol=0, atol=0)

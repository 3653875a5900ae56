"""Small real Hugging Face checkpoints, made on the spot: the architectures that run, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from profiler.model.architectures.table import ARCHITECTURES

LLAMA3_ROPE = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
)

# One entry an architecture and a trait that the runtime must get right.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama": ("Llama", {"rope_parameters": dict(LLAMA3_ROPE), "num_key_value_heads": 2}),
        "llama-bias-one-kv-head": (
            "Llama",
            {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True},
        ),
        "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 24}),
        "phi3": ("Phi3", {"num_key_value_heads": 2, "pad_token_id": None}),
        "olmo2": ("Olmo2", {"num_key_value_heads": 2, "pad_token_id": None}),
        "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    }
)


def write_checkpoint(folder: Path, variant: str = "llama", *, seed: int = 0, **sizes: Any) -> Path:
    """Write a checkpoint of VARIANTS[variant], or the example of the architecture of that name: sharded safetensors and
    an index. `sizes` replaces configuration."""
    import torch
    import transformers

    family, traits = VARIANTS.get(variant) or (
        variant.removesuffix("ForCausalLM"), ARCHITECTURES[variant].example
    )  # fmt: skip
    settings = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "vocab_size": 211,  # no multiple of two: the head's slices are uneven
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.1,  # wide enough that greedy choices have a clear winner
        **traits,
        **sizes,
    }
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{family}ForCausalLM")
    config = kind.config_class(**settings)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight", "sinks")):  # made as zeros and ones, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="150KB")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer with 200 entries or more, small enough for the checkpoints above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder

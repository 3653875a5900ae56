"""A small Llama checkpoint in Hugging Face format, random weights, written on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSize:
    """Sizes of the checkpoint: small enough for two cores, large enough that a round takes milliseconds."""

    hidden_size: int = 512
    intermediate_size: int = 1536
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int = 4
    max_positions: int = 16384


DEMO = DemoSize()  # 42 million parameters
SMALL = DemoSize(hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2)


def write_demo_model(folder: Path, size: DemoSize = DEMO, *, seed: int = 0) -> None:
    """Write config.json, sharded safetensors with their index, and a byte-level tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=size.max_positions,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        # Random weights have no end of text; without this a run of equal tokens might stop early.
        eos_token_id=None,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="32MB")
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """One token a byte: a text's length in tokens is its length in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

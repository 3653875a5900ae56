"""Architectures that neither kernels here nor Transformers run: their layers as wholes, for plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from db.errors import UserError
from profiler.model.fields import positive
from profiler.model.whole.layer import Mixer, WholeLayer

Config = Mapping[str, Any]
_STEP = 256  # intermediate sizes are rounded up to multiples of it


def _decilm(config: Config) -> tuple[WholeLayer, ...]:
    """Llama's layers after a search took out attention or narrowed the MLP, block by block (Puzzle, 2411.19146)."""
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != positive(config, "num_hidden_layers"):
        raise UserError("block_configs", type(blocks).__name__, "must be a list with an entry a layer")
    made: dict[WholeLayer, WholeLayer] = {}
    layers = [_decilm_layer(config, index, block) for index, block in enumerate(blocks)]
    return tuple(made.setdefault(layer, layer) for layer in layers)


def _decilm_layer(config: Config, index: int, block: Any) -> WholeLayer:
    where = f"block_configs[{index}]"
    attention, mlp = (block.get(name) if isinstance(block, Mapping) else None for name in ("attention", "ffn"))
    if not isinstance(attention, Mapping) or not isinstance(mlp, Mapping):
        raise UserError(where, block, "must be an object with attention and ffn")
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    head_dim = positive(config, "head_dim", hidden // heads)
    tensors: list[tuple[str, tuple[int, ...]]] = []
    attends = not attention.get("no_op") and not attention.get("replace_with_linear")
    kv_heads = heads // positive(attention, "n_heads_in_group") if attends else 0
    if attends:
        for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors.append((f"self_attn.{name}_proj.weight", (size * head_dim, hidden)))
        tensors.append(("self_attn.o_proj.weight", (hidden, heads * head_dim)))
    elif attention.get("replace_with_linear"):
        tensors.append(("self_attn.linear_attn.weight", (hidden, hidden)))
    if not attention.get("no_op"):
        tensors.append(("input_layernorm.weight", (hidden,)))
    if mlp.get("replace_with_linear"):
        tensors.append(("mlp.linear_mlp.weight", (hidden, hidden)))
    elif not mlp.get("no_op"):
        width = int(2 * float(mlp.get("ffn_mult") or 0.0) * hidden / 3)
        width += -width % _STEP
        tensors += [(f"mlp.{name}_proj.weight", (width, hidden)) for name in ("gate", "up")]
        tensors.append(("mlp.down_proj.weight", (hidden, width)))
    if not mlp.get("no_op"):
        tensors.append(("post_attention_layernorm.weight", (hidden,)))
    window = attention.get("window_length")
    return WholeLayer(
        mixer=(Mixer.WINDOW if window else Mixer.FULL) if attends else Mixer.NONE,
        hidden_size=hidden,
        tensors=tuple(tensors),
        active_elements=sum(size[0] * size[1] for _, size in tensors if len(size) == 2),
        pair_numbers=2 * heads * head_dim if attends else 0,
        kv_numbers=2 * kv_heads * head_dim,
        window=int(window) if window else None,
    )


PLANNED: Mapping[str, Callable[[Config], tuple[WholeLayer, ...]]] = MappingProxyType({"DeciLMForCausalLM": _decilm})

"""Models of which Transformers knows the layers: described by its modules on the meta device, and a few fields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from db.errors import UserError
from profiler.model.fields import MAX_SIZE
from profiler.model.whole.layer import Mixer, RoutedExperts, WholeLayer

# How configurations call one thing.
_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token", "experts_per_token")
_MIXERS = {
    "full_attention": Mixer.FULL,
    "indexed_attention": Mixer.FULL,
    "sliding_attention": Mixer.WINDOW,
    "chunked_attention": Mixer.CHUNKED,
    "conv": Mixer.CONVOLUTION,
    "linear_attention": Mixer.LINEAR,
    "hybrid": Mixer.HYBRID,
    "hybrid_sliding": Mixer.HYBRID,
}


class Described:
    """What the modules of a decoder say: its layers, its ends, and how many numbers the whole model has."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers.cache_utils import get_layer_types_and_kwargs

        from profiler.library.found import find
        from profiler.library.skeleton import build

        self.found = find(config)
        skeleton = build(self.found)
        self.text = self.found.text
        kinds, kwargs = get_layer_types_and_kwargs(self.text)
        configs = self.text.per_layer_config
        seen: dict[WholeLayer, WholeLayer] = {}
        layers = [
            _layer(module, kind, window.get("sliding_window"), own)
            for module, kind, window, own in zip(skeleton.layers, kinds, kwargs, configs, strict=True)
        ]
        self.layers = tuple(seen.setdefault(layer, layer) for layer in layers)
        self.num_parameters = skeleton.parameters_of(skeleton.model)
        head, embedding = skeleton.head, skeleton.embedding
        self.is_tied = head is None or head.weight is embedding.weight
        inside = skeleton.parameters_of(skeleton.decoder)
        self.num_text_parameters = inside + (0 if self.is_tied else skeleton.parameters_of(head))
        self.hidden_size, self.vocab_size = int(self.text.hidden_size), int(embedding.weight.shape[0])
        self.max_positions = int(getattr(self.text, "max_position_embeddings", None) or MAX_SIZE)
        self.refusal = _refusal(self.text, kinds, skeleton)


@lru_cache(maxsize=4)
def _described(text: str) -> Described:
    return Described(json.loads(text))


def described(config: Mapping[str, Any]) -> Described:
    """The same for a configuration read before; raises `UserError` where Transformers has no such decoder."""
    return _described(json.dumps(config, sort_keys=True, default=str))


def _refusal(text: Any, kinds: list[str], skeleton: Any) -> str | None:
    """Why the decoder is planned and not run, or None."""
    if any(kind not in (*_MIXERS, "dummy") for kind in kinds):
        names = sorted({kind for kind in kinds if kind not in _MIXERS and kind != "dummy"})
        return f"layers of type {', '.join(names)} keep a cache of their own"
    turning = _rope_types(text) & {"dynamic", "longrope"}
    if turning:
        return f"its rotation changes with the prompt's length ({turning.pop()}), which chunks do not know"
    if getattr(text, "hidden_size_per_layer_input", 0):
        return "each layer reads an embedding of its own"
    if "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        return "layers read keys and values of earlier ones"
    if getattr(skeleton.model, "_is_stateful", False) and "linear_attention" not in kinds and "hybrid" not in kinds:
        return "its state has a cache of its own"
    return None


def _rope_types(text: Any) -> set[str]:
    parameters = getattr(text, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    return {str(one["rope_type"]) for one in each if one.get("rope_type")}


def _layer(module: Any, kind: str, window: int | None, config: Any) -> WholeLayer:
    """One layer by its module, the type of its cache, and its own configuration."""
    tensors = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    experts = _experts(tensors, config)
    active, idle = _active(tensors, experts)
    mixing = _mixing(module)
    mixer = _MIXERS.get(kind, Mixer.FULL)
    if kind == "dummy":
        mixer = Mixer.SHARED if any("_proj" in name and "attn" in name for name, _ in tensors) else Mixer.NONE
    if mixer is Mixer.CHUNKED:
        window = int(config.attention_chunk_size)
    keeps_kv = mixer in (Mixer.FULL, Mixer.WINDOW, Mixer.CHUNKED, Mixer.HYBRID)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    key, value, kv_numbers = _kv(mixing, tensors, config, heads) if keeps_kv else (0, 0, 0)
    if mixer is Mixer.FULL and _latent_rank(mixing, tensors, config):
        mixer = Mixer.LATENT
    if mixer is Mixer.SHARED:
        key, value, _ = _kv(mixing, tensors, config, heads)
    has_state = mixer in (Mixer.LINEAR, Mixer.CONVOLUTION, Mixer.HYBRID)
    indexed = kind == "indexed_attention"
    selector = int(config.index_n_heads * config.index_head_dim) if indexed else 0
    cached_selector = int(config.index_head_dim) if indexed else 0
    softcap = getattr(config, "attn_logit_softcapping", None)
    return WholeLayer(
        mixer=mixer,
        hidden_size=int(config.hidden_size),
        tensors=tensors,
        active_elements=active,
        idle_elements=idle,
        pair_numbers=heads * (key + value),
        kv_numbers=kv_numbers + cached_selector,
        state_numbers=_state(module, config) if has_state else 0,
        window=window if mixer in (Mixer.WINDOW, Mixer.CHUNKED, Mixer.HYBRID) else None,
        selected=int(config.index_topk) if indexed else None,
        selector_numbers=selector,
        experts=experts,
        has_sinks=any(name.endswith("sinks") or "attention_sink_bias" in name for name, _ in tensors),
        softcap=float(softcap) if softcap else None,
    )


def _is_routed(name: str) -> bool:
    return "experts." in name and "shared_expert" not in name


def _experts(tensors: tuple[tuple[str, tuple[int, ...]], ...], config: Any) -> RoutedExperts | None:
    routed = [(name, size) for name, size in tensors if _is_routed(name)]
    if not routed:
        return None
    stacked = [size[0] for _, size in routed if len(size) == 3]
    numbered = {name.split("experts.")[1].split(".")[0] for name, _ in routed}
    count = stacked[0] if stacked else len(numbered)
    per_token = next((value for name in _PER_TOKEN if isinstance(value := getattr(config, name, None), int)), None)
    if per_token is None:
        raise UserError("num_experts_per_tok", None, "must tell how many experts a token goes to")
    return RoutedExperts(
        count=count,
        per_token=per_token,
        shared=any("shared_expert" in name or "shared_mlp" in name for name, _ in tensors),
    )


def _active(tensors: tuple[tuple[str, tuple[int, ...]], ...], experts: RoutedExperts | None) -> tuple[int, int]:
    """Numbers of matrices that a token is multiplied with, and of experts that it does not go to."""
    total = idle = 0
    for name, size in tensors:
        numbers = math.prod(size)
        if experts is not None and _is_routed(name):
            used = numbers * experts.per_token // experts.count
            idle += numbers - used
            numbers = 0 if name.endswith("bias") else used
        elif len(size) < 2 or "conv" in name:
            numbers = 0
        total += numbers
    return total, idle


def _mixing(module: Any) -> Any:
    """The attention of a layer: the innermost module that projects to keys, or to what they are made of."""
    names = ("k_proj", "kv_a_proj_with_mqa", "qkv_proj", "query_key_value", "Wqkv", "kv_a_proj", "kv_proj")
    return next((inner for inner in module.modules() if any(hasattr(inner, name) for name in names)), None)


def _latent_rank(mixing: Any, tensors: Any, config: Any) -> int:
    """Features that keys and values are compressed to, 0 where they are not."""
    rank = getattr(mixing, "kv_lora_rank", None) or getattr(config, "kv_lora_rank", None)
    return int(rank) if rank and any("kv_a_proj" in name or "kv_b_proj" in name for name, _ in tensors) else 0


def _kv(mixing: Any, tensors: Any, config: Any, heads: int) -> tuple[int, int, int]:
    """Features of a key and of a value head, and the numbers of a token that are kept: of latents compressed ones."""
    if rank := _latent_rank(mixing, tensors, config):
        rotated = int(config.qk_rope_head_dim)
        return int(config.qk_nope_head_dim) + rotated, int(config.v_head_dim), rank + rotated
    head_dim = getattr(mixing, "head_dim", None) or getattr(config, "head_dim", None)
    head_dim = int(head_dim or config.hidden_size // heads)
    value_dim = int(getattr(mixing, "v_head_dim", None) or head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if mixing is not None and hasattr(mixing, "k_proj"):
        kv_heads = mixing.k_proj.weight.shape[0] // head_dim
    return head_dim, value_dim, int(kv_heads) * (head_dim + value_dim)


def _state(module: Any, config: Any) -> int:
    """Numbers of a recurrent state and of the inputs that a short convolution keeps."""
    total = 0
    for inner in module.modules():
        conv = getattr(inner, "conv1d", None) if hasattr(inner, "conv1d") else getattr(inner, "conv", None)
        kernel = getattr(conv, "weight", None)
        if kernel is not None and kernel.dim() == 3:
            total += kernel.shape[0] * kernel.shape[2]
        if hasattr(inner, "head_k_dim") and hasattr(inner, "num_v_heads"):
            total += inner.num_v_heads * inner.head_k_dim * inner.head_v_dim
        elif hasattr(inner, "ssm_state_size"):
            total += int(getattr(inner, "intermediate_size", 0) or config.hidden_size) * inner.ssm_state_size
    return int(total)

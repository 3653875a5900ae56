"""Latent attention (MLA): DeepSeek-V2 and V3, and Kimi-K2 under V3's name, with DeepSeek's mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from db.errors import UserError
from profiler.model.architectures.architecture import Architecture, Config
from profiler.model.architectures.dense import gated_mlp, number
from profiler.model.architectures.mixture import DENSE, GROUPED, deepseek_mixture, first_dense
from profiler.model.experts import Scoring
from profiler.model.fields import KernelsMissingError, positive
from profiler.model.rope import head_order, rope_parameters, rope_type, yarn_scale
from profiler.model.spec import AttentionSpec, LatentSpec, LayerSpec
from profiler.model.tensors import Cut, Dim, Folding, LinearSpec, NormSpec, TensorPart


def latent_layer(config: Config, *, interleaved: bool) -> LayerSpec:
    """Latent attention and SwiGLU with a norm before each."""
    hidden, num_heads = Dim(positive(config, "hidden_size")), positive(config, "num_attention_heads")
    rank, plain, turned, value = (
        positive(config, name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    if turned % 2:
        raise UserError("qk_rope_head_dim", turned, "must be even: the rotation turns its numbers in pairs")
    bias = bool(config.get("attention_bias", False))
    order = head_order(turned, interleaved=interleaved)
    whole = None if order is None else (*range(plain), *(plain + index for index in order))
    heads, folding = Dim(num_heads, plain + turned), Folding(order=whole, scale=_score_scale(config))
    kept = (
        TensorPart("self_attn.kv_a_proj_with_mqa", Dim(rank)),
        TensorPart("self_attn.kv_a_proj_with_mqa", Dim(1, turned), first_row=rank, folding=Folding(order=order)),
    )
    queries, of_queries, q_norm = hidden, tuple[TensorPart, ...](), None
    name = "self_attn.q_proj"
    if config.get("q_lora_rank") is not None:
        queries, name = Dim(positive(config, "q_lora_rank")), "self_attn.q_b_proj"
        of_queries, q_norm = (TensorPart("self_attn.q_a_proj", queries),), NormSpec("self_attn.q_a_layernorm", queries)
    expand = TensorPart("self_attn.kv_b_proj", Dim(num_heads, plain + value))
    o = TensorPart("self_attn.o_proj", hidden)
    return LayerSpec(
        attention=AttentionSpec(
            heads=heads,
            kv_heads=Dim(1, rank + turned),
            qkv=LinearSpec(
                name="qkv", cut=Cut.REPLICATED, parts=(*of_queries, *kept), inputs=hidden, has_bias=bias
            ),
            o=LinearSpec(name="o", cut=Cut.ROW, parts=(o,), inputs=Dim(num_heads, value), has_bias=bias),
            q_norm=q_norm,
            k_norm=NormSpec("self_attn.kv_a_layernorm", Dim(rank)),
            latent=LatentSpec(
                rank=rank,
                plain=plain,
                turned=turned,
                value=value,
                q=LinearSpec(
                    name="q", cut=Cut.COLUMN, parts=(TensorPart(name, heads, folding=folding),), inputs=queries
                ),
                expand=LinearSpec(name="expand", cut=Cut.COLUMN, parts=(expand,), inputs=Dim(rank)),
            ),
        ),
        mlp=gated_mlp(hidden, Dim(positive(config, "intermediate_size"))),
        before_attention=NormSpec("input_layernorm", hidden),
        before_mlp=NormSpec("post_attention_layernorm", hidden),
    )  # fmt: skip


def _score_scale(config: Config) -> float:
    """What scores are multiplied with beside the root of a head's features: the square of YaRN's scale."""
    parameters = rope_parameters(config)
    if rope_type(config) == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    return yarn_scale(number(parameters, "factor", 1.0), number(parameters, "mscale_all_dim", 0.0)) ** 2


def _deepseek_v3(config: Config, kind: str) -> LayerSpec:
    layer = latent_layer(config, interleaved=bool(config.get("rope_interleave", True)))
    return layer if kind.endswith(DENSE) else deepseek_mixture(layer, config)


def _deepseek_v2(config: Config, kind: str) -> LayerSpec:
    """Softmax scores, the best expert of each group, weights that do not add up to 1."""
    layer = latent_layer(config, interleaved=True)
    if config.get("mlp_bias"):
        raise KernelsMissingError("mlp_bias", True, "must be false")
    if kind.endswith(DENSE):
        return layer
    method, is_grouped = config.get("topk_method") or "greedy", False
    match method:
        case "greedy":
            pass
        case "group_limited_greedy":
            is_grouped = True
        case _:
            raise KernelsMissingError("topk_method", method, "supported are greedy and group_limited_greedy")
    if config.get("norm_topk_prob"):
        raise KernelsMissingError("norm_topk_prob", True, "must be false")
    layer = deepseek_mixture(layer, config if is_grouped else dict(config) | {"n_group": 1, "topk_group": 1})
    assert layer.experts is not None
    router = replace(layer.experts.router, scoring=Scoring.SOFTMAX, bias=None, normalized=False, best_of_group=1)
    return replace(layer, mlp=replace(layer.experts, router=router))


_LATENT = {name: size for name, size in GROUPED.items() if name != "head_dim"} | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "n_shared_experts": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "mscale": 0.707, "mscale_all_dim": 1.0,
}  # fmt: skip

LATENT = {
    "DeepseekV2ForCausalLM": Architecture(
        layer=_deepseek_v2, refined=first_dense(0),
        example=_LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "attention_bias": True},
    ),
    "DeepseekV3ForCausalLM": Architecture(
        layer=_deepseek_v3, refined=first_dense(3), example=_LATENT | {"q_lora_rank": 24, "rope_parameters": _YARN}
    ),
}  # fmt: skip

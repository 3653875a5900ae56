"""Mixtures of experts: layers of other families with a router and experts in the place of the MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from db.errors import UserError
from profiler.model.architectures.architecture import FULL, SLIDING, Architecture, Config
from profiler.model.architectures.dense import (
    all_sliding,
    dense_layer,
    gated_mlp,
    head_norms,
    number,
    partly_turned,
    windowed,
)
from profiler.model.architectures.llama import norms_of_all_heads, qwen_types
from profiler.model.experts import ExpertGate, ExpertsMLP, ExpertTensors, Router, Scoring
from profiler.model.fields import KernelsMissingError, positive
from profiler.model.quantization import FIELD
from profiler.model.spec import ROUTER, LayerSpec
from profiler.model.tensors import Cut, Dim, LinearSpec, NormSpec, TensorPart

_LLAMA_NAMES = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
DENSE = " dense"


def mixture(
    layer: LayerSpec,
    config: Config,
    *,
    count: int,
    features: int,
    gate: str = "mlp.gate",
    gate_bias: bool = False,
    names: tuple[str, ...] = _LLAMA_NAMES,
    has_bias: bool = False,
    **router: Any,
) -> LayerSpec:
    """The layer with `count` experts of so many features; router: arguments of `Router`."""
    if config.get(FIELD) and len(names) == 2:
        raise KernelsMissingError(FIELD, "of experts in one tensor", "kernels here read plain ones alone")
    hidden, experts, per_token = Dim(layer.hidden_size), Dim(count), positive(config, "num_experts_per_tok")
    if per_token > count:
        raise UserError("num_experts_per_tok", per_token, f"at most the {count} experts")
    parts = (TensorPart(gate, experts),)
    made = LinearSpec(name=ROUTER, cut=Cut.REPLICATED, parts=parts, inputs=hidden, has_bias=gate_bias, kept=True)
    return replace(
        layer,
        mlp=ExpertsMLP(
            router=Router(gate=made, per_token=per_token, **router),
            experts=experts,
            hidden=hidden,
            features=Dim(features),
            tensors_of=ExpertTensors(names=names, has_bias=has_bias),
        ),
    )


def with_shared(layer: LayerSpec, features: int, prefix: str, *, gate: str | None = None) -> LayerSpec:
    """With an expert that every token goes to, times a gate of its own if it is named."""
    assert layer.experts is not None
    hidden = Dim(layer.hidden_size)
    mlp = gated_mlp(hidden, Dim(features), prefix=prefix)
    shared = replace(
        mlp, gate_up=replace(mlp.gate_up, name="shared_gate_up"), down=replace(mlp.down, name="shared_down")
    )
    shared_gate = None
    if gate is not None:
        shared_gate = LinearSpec(
            name="shared_gate", cut=Cut.REPLICATED, parts=(TensorPart(gate, Dim(1)),), inputs=hidden, kept=True
        )
    return replace(layer, mlp=replace(layer.experts, shared=shared, shared_gate=shared_gate))


def _count(config: Config) -> int:
    """Routed experts, however the field is called."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return positive(config, next((name for name in names if config.get(name) is not None), names[0]))


def _mixtral(config: Config, kind: str) -> LayerSpec:
    layer = windowed(dense_layer(config), config, kind)
    names = tuple(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))
    count, features = _count(config), positive(config, "intermediate_size")
    return mixture(layer, config, count=count, features=features, gate="block_sparse_moe.gate", names=names)


def _qwen_mixture(layer: LayerSpec, config: Config, kind: str) -> LayerSpec:
    layer = windowed(layer, config, kind.removesuffix(DENSE))
    if kind.endswith(DENSE):
        return layer
    return mixture(
        layer, config, count=_count(config), features=positive(config, "moe_intermediate_size"),
        normalized=bool(config.get("norm_topk_prob", False)),
    )  # fmt: skip


def _qwen3_moe(config: Config, kind: str) -> LayerSpec:
    bias = bool(config.get("attention_bias", False))
    return _qwen_mixture(head_norms(dense_layer(config, qkv_bias=bias, o_bias=bias)), config, kind)


def _qwen2_moe(config: Config, kind: str) -> LayerSpec:
    layer = _qwen_mixture(dense_layer(config, qkv_bias=bool(config.get("qkv_bias", True))), config, kind)
    if layer.experts is None:
        return layer
    features = positive(config, "shared_expert_intermediate_size")
    return with_shared(layer, features, "mlp.shared_expert", gate="mlp.shared_expert_gate")


def _sparse_steps(config: Config, types: Sequence[str]) -> Sequence[str]:
    """Which layers have experts: one in every few, and none of those listed."""
    step, dense = positive(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return [
        kind if index not in dense and (index + 1) % step == 0 else kind + DENSE for index, kind in enumerate(types)
    ]


def _olmoe(config: Config, kind: str) -> LayerSpec:
    if config.get("clip_qkv") is not None:
        raise KernelsMissingError("clip_qkv", config["clip_qkv"], "must be null")
    bias = bool(config.get("attention_bias", False))
    layer = windowed(norms_of_all_heads(dense_layer(config, qkv_bias=bias, o_bias=bias)), config, kind)
    return mixture(
        layer, config, count=_count(config), features=positive(config, "intermediate_size"),
        normalized=bool(config.get("norm_topk_prob", False)),
    )  # fmt: skip


def _gpt_oss(config: Config, kind: str) -> LayerSpec:
    """Attention sinks, and experts with biases and a gate of their own."""
    bias = bool(config.get("attention_bias", True))
    layer = windowed(dense_layer(config, qkv_bias=bias, o_bias=bias), config, kind)
    sinks = NormSpec("self_attn.sinks", Dim(layer.attention.heads.count), Cut.COLUMN, suffix="")
    layer = mixture(
        replace(layer, attention=replace(layer.attention, sinks=sinks)), config,
        count=_count(config), features=positive(config, "intermediate_size"),
        gate="mlp.router", gate_bias=True, names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), has_bias=True,
        scoring=Scoring.CHOSEN,
    )  # fmt: skip
    assert layer.experts is not None
    limit, alpha = number(config, "swiglu_limit", 7.0), number(config, "swiglu_alpha", 1.702)
    return replace(layer, mlp=replace(layer.experts, gate=ExpertGate.CLAMPED, limit=limit, alpha=alpha))


def deepseek_mixture(layer: LayerSpec, config: Config) -> LayerSpec:
    """Sigmoid scores, a bias for the choice, groups of experts, and shared ones (DeepSeek-V3, 2412.19437)."""
    count = _count(config)
    groups, opened = positive(config, "n_group", 1), positive(config, "topk_group", 1)
    if count % groups or opened > groups:
        raise UserError("n_group", groups, f"must divide {count} experts, and be at least topk_group = {opened}")
    features = positive(config, "moe_intermediate_size")
    layer = mixture(
        layer, config, count=count, features=features, scoring=Scoring.SIGMOID,
        normalized=bool(config.get("norm_topk_prob", True)), scale=number(config, "routed_scaling_factor", 1.0),
        bias=NormSpec("mlp.gate.e_score_correction_bias", Dim(count), suffix=""),
        groups=groups, groups_per_token=opened,
    )  # fmt: skip
    return with_shared(layer, features * positive(config, "n_shared_experts", 1), "mlp.shared_experts")


def _glm4_moe(config: Config, kind: str) -> LayerSpec:
    layer = dense_layer(config, qkv_bias=bool(config.get("attention_bias", False)))
    layer = head_norms(layer) if config.get("use_qk_norm", False) else layer
    layer = partly_turned(windowed(layer, config, kind.removesuffix(DENSE)), config, default=0.5)
    return layer if kind.endswith(DENSE) else deepseek_mixture(layer, config)


def first_dense(default: int) -> Callable[[Config, Sequence[str]], Sequence[str]]:
    """The first layers have no experts: as many as the configuration says, or `default`."""

    def refined(config: Config, types: Sequence[str]) -> Sequence[str]:
        dense = config.get("first_k_dense_replace")
        dense = default if dense is None else dense
        if not isinstance(dense, int) or dense < 0:
            raise UserError("first_k_dense_replace", dense, "must be a number of layers in config.json")
        if (step := config.get("moe_layer_freq", 1)) != 1:
            raise KernelsMissingError("moe_layer_freq", step, "must be 1")
        return [kind + DENSE if index < dense else kind for index, kind in enumerate(types)]

    return refined


_SMALL = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "pad_token_id": None}
GROUPED = _SMALL | {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "head_dim": 16}

MIXTURES = {
    "MixtralForCausalLM": Architecture(
        layer=_mixtral, layer_types=all_sliding, norm_eps=1e-5, example=_SMALL | {"num_local_experts": 5}
    ),
    "Qwen2MoeForCausalLM": Architecture(
        layer=_qwen2_moe, layer_types=qwen_types, refined=_sparse_steps,
        example=_SMALL | {"num_experts": 8, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        layer=_qwen3_moe, layer_types=qwen_types, refined=_sparse_steps,
        example=_SMALL | {"num_experts": 7, "head_dim": 16, "norm_topk_prob": True},
    ),
    "OlmoeForCausalLM": Architecture(
        layer=_olmoe, norm_eps=1e-5, example=_SMALL | {"num_experts": 8}
    ),
    "GptOssForCausalLM": Architecture(
        layer=_gpt_oss, norm_eps=1e-5,
        example=_SMALL | {"num_local_experts": 6, "head_dim": 16, "sliding_window": 37,
                          "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING]},
    ),
    "Glm4MoeForCausalLM": Architecture(
        layer=_glm4_moe, refined=first_dense(1), norm_eps=1e-5,
        example=GROUPED | {"use_qk_norm": True, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
    ),
}  # fmt: skip

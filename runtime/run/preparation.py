"""Checks a plan against the model, the weights, the prompts and the machine before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from db.errors import UserError
from profiler.comm.ranks.launch import under_torchrun
from profiler.hardware.device import check_device_type, check_world_size
from profiler.kernels.attention import available_kernels
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.model import (
    PRECISIONS,
    Backend,
    ModelShape,
    bundled_names,
    load_model_shape,
    model_from_config,
    precision_of,
)
from profiler.sequence.kind import SPKind
from runtime.run.prompts import TokenIds, check_prompts
from tuner.plan.attention_kernels import AttentionKernels
from tuner.plan.layout import check_experts_fit, check_precision_fits, check_sequence_fits
from tuner.plan.plan import MAX_THREADS, Plan

MOST_PROMPT_TOKENS = 2**24  # their ids, as Python holds them, take some 0.7 GB; any KV cache takes far more
# What decides the work; the rest of a configuration (names, dates, dropout) may differ between plan and weights.
_SIZE_FIELDS = (
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias",
)  # fmt: skip


def with_dtype(plan: Plan, dtype: str | None) -> Plan:
    """The plan in the precision it will run in, `dtype` if given. Raises `UserError` for one that cannot be run."""
    precision = plan.precision if dtype is None else dtype
    precision_of(precision, field="precision" if dtype is None else "--dtype")
    if precision == plan.precision:
        return plan
    # These were the other precision's.
    return replace(plan, precision=precision, predicted=None, cost_model=None, attention_kernels=None)


def model_shape(model: Mapping[str, object], weights: Path | None) -> ModelShape:
    """The shape to run: that of the weights, which must agree with the plan's `model`, else that of the plan.

    A plan for random weights may name a bundled shape instead of carrying a configuration.
    """
    name, backend = str(model.get("name") or "model"), str(model.get("backend") or "auto")
    if weights is None:
        if "architectures" not in model and name in bundled_names():
            return load_model_shape(name, backend=backend)
        if "architectures" not in model:
            raise UserError("model", dict(model), "must be the configuration of a model (its config.json)")
        return model_from_config(model, name=name, backend=backend)
    if not (weights / "config.json").is_file():
        raise UserError("weights", weights, "must be a folder with a config.json and safetensors")
    shape = load_model_shape(str(weights), backend=backend)
    for field in _SIZE_FIELDS:
        planned, found = model.get(field), shape.config.get(field)
        if planned is not None and found is not None and planned != found:
            raise UserError(f"model.{field}", planned, f"must be {found}, as in the weights at {weights}")
    return shape


def check_layout(plan: Plan, shape: ModelShape, *, max_new_tokens: int, device_type: str) -> None:
    """Raise `UserError` unless the model can be cut as planned, holds the prompts, and the machine has the devices."""
    parallel = plan.parallel
    if shape.backend is Backend.PLANNING:
        raise UserError("model", shape.architecture, f"is planned only: {shape.unrun}")
    if shape.backend is Backend.TRANSFORMERS:
        _check_whole(plan)
    else:
        shape.check_device(device_type)
        check_sequence_fits(shape, parallel.sp_kind)
        check_experts_fit(shape, PRECISIONS[plan.precision], parallel.weights)
    if parallel.ep_size > 1 and not shape.has_experts:
        raise UserError("parallel.ep_size", parallel.ep_size, f"1: kernels here run no experts of {shape.architecture}")
    check_precision_fits(PRECISIONS[plan.precision], parallel.sp_kind, parallel.weights)
    if parallel.sp_kind is SPKind.ULYSSES:
        for layer in shape.layer_kinds:
            heads = layer.attention.heads.per_rank(parallel.tp_size)
            if parallel.sp_size > heads:
                allowed = f"at most {heads} with sp_kind ulysses: the query heads at tp_size {parallel.tp_size}"
                raise UserError("parallel.sp_size", parallel.sp_size, allowed)
    shape.spread(**parallel.spread).check_tp_size(parallel.tp_size)
    if parallel.pp_size > shape.num_layers:
        raise UserError("parallel.pp_size", parallel.pp_size, f"at most {shape.num_layers}, the model's layers")
    if sum(parallel.layer_partition) != shape.num_layers:
        allowed = f"must add up to {shape.num_layers}, the model's layers"
        raise UserError("parallel.layer_partition", list(parallel.layer_partition), allowed)
    if max_new_tokens > shape.max_positions:
        raise UserError("--max-new-tokens", max_new_tokens, f"at most {shape.max_positions}: {shape.positions_words}")
    for index, request in enumerate(plan.requests):
        most = shape.max_positions - max_new_tokens + 1
        if request.prompt_tokens > most:
            allowed = f"at most {most} with {max_new_tokens} new tokens: {shape.positions_words}"
            raise UserError(f"requests[{index}].prompt_tokens", request.prompt_tokens, allowed)
    tokens = sum(request.prompt_tokens for request in plan.requests)
    if tokens > MOST_PROMPT_TOKENS:
        raise UserError("prompt_tokens of all requests", tokens, f"at most {MOST_PROMPT_TOKENS} in a plan that is run")
    check_device_type(device_type)
    if not under_torchrun():
        check_world_size(parallel.world_size, device_type)


def _check_whole(plan: Plan) -> None:
    """Raise `UserError` for what layers that are run as wholes do not take."""
    parallel, allowed = plan.parallel, "in a model that Transformers runs"
    if PRECISIONS[plan.precision].linears is not None:
        raise UserError("precision", plan.precision, f"must be a plain one {allowed}")
    for name, value in (("sp_size", parallel.sp_size), ("virtual_stages", parallel.virtual_stages)):
        if value > 1:
            raise UserError(f"parallel.{name}", value, f"must be 1 {allowed}")


def attention_kernels(plan: Plan, device_type: str) -> AttentionKernels:
    """The kernels that run: the plan's, and the usual best of the device for those that it lacks."""
    available = available_kernels(torch.device(device_type), PRECISIONS[plan.precision].activations.torch_dtype)
    return (plan.attention_kernels or AttentionKernels(usual=available[0])).among(available)


def missing_kernels(plan: Plan, kernels: AttentionKernels) -> tuple[AttentionKernel, ...]:
    """The plan's kernels that are not among those that run."""
    planned = plan.attention_kernels.named if plan.attention_kernels else ()
    return tuple(kernel for kernel in planned if kernel not in kernels.named)


def check_counts(*, max_new_tokens: int, repeat: int, num_threads: int) -> None:
    """Raise `UserError` unless all are at least 1."""
    for name, value in (
        ("--max-new-tokens", max_new_tokens),
        ("--repeat", repeat),
        ("--threads-per-rank", num_threads),
    ):
        if value < 1:
            raise UserError(name, value, "at least 1")
    if num_threads > MAX_THREADS:
        raise UserError("--threads-per-rank", num_threads, f"at most {MAX_THREADS}")


def checked_prompts(prompts: Sequence[Sequence[int]], plan: Plan, vocab_size: int) -> tuple[TokenIds, ...]:
    """The prompts as the ranks take them."""
    made = tuple(tuple(ids) for ids in prompts)
    check_prompts(made, plan.requests, vocab_size)
    return made

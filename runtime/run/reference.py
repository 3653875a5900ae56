"""The reference: tokens of Transformers' `generate` for the same prompts and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from profiler.kernels.quantized.kv import QuantizedKV
from profiler.kernels.quantized.rounding import quantize_rows, quantize_static, widened
from profiler.kernels.quantized.weight import quantize_weight
from profiler.library.found import find
from profiler.model import ModelShape, Precision, load_model_shape, precision_of
from profiler.model.precision import LinearFormat
from profiler.model.quantization import FIELD
from profiler.model.shape import layer_prefix
from profiler.model.tensors import LinearSpec
from runtime.run.prompts import TokenIds
from runtime.run.result import RequestResult
from runtime.weights.checkpoint import Checkpoint
from runtime.weights.quantized import open_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCheck:
    """One request's new tokens beside those of Transformers."""

    id: str
    equal: bool
    expected: TokenIds
    first_mismatch: int | None = None  # index among the new tokens
    top2_margin: float | None = None  # between the reference's two largest logits there; small: either choice is fair


def check_tokens(
    results: Sequence[RequestResult],
    prompts: Sequence[TokenIds],
    weights: Path,
    *,
    dtype: str,
    max_new_tokens: int,
    end_ids: frozenset[int],
    device_type: str = "cpu",
) -> tuple[TokenCheck, ...]:
    """Run `generate` greedily in the same precision, one prompt at a time, and compare token by token."""
    import transformers

    precision = precision_of(dtype)
    model = load_reference(weights, precision).to(device_type)
    # A configuration of our own: a checkpoint's may sample or punish repetition.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return tuple(
        _check(model, result, prompt, rounding_cache(weights, precision))
        for result, prompt in zip(results, prompts, strict=True)
    )


def load_reference(weights: Path, precision: Precision) -> Any:
    """Transformers' model of a checkpoint.

    Where linears are quantized it multiplies plain numbers that were rounded to 8 bits before: the same arithmetic,
    without any 8-bit product.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape, dtype = load_model_shape(str(weights)), precision.weights.torch_dtype
    if precision.linears is None and shape.quantization is None:
        kind = find(shape.config).model_class
        return kind.from_pretrained(weights, dtype=dtype, local_files_only=True)
    found = find({key: value for key, value in shape.config.items() if key != FIELD})
    checkpoint = open_checkpoint(weights, shape, dtype=dtype)
    state = {name: checkpoint.read(name) for name in shape.tensors()}
    if precision.linears is not None:
        _round_weights(state, shape, checkpoint, precision.linears)
    # A copy: what is loaded is taken out of it.
    model = found.model_class.from_pretrained(None, config=found.config, state_dict=dict(state), dtype=dtype)
    if precision.linears is not None and precision.linears.activations is not None:
        _round_inputs(model, shape, checkpoint, precision.linears)
    return model.eval()


def _round_weights(
    state: dict[str, torch.Tensor], shape: ModelShape, checkpoint: Checkpoint, linears: LinearFormat
) -> None:
    for index, layer in enumerate(shape.layers):
        for linear in layer.every_linear:
            for name in (
                () if linear.kept else dict.fromkeys(layer_prefix(index) + part.tensor for part in linear.parts)
            ):
                if checkpoint.stored(name) is None:
                    weight = f"{name}.weight"
                    made = quantize_weight(state[weight], linears.weights.torch_dtype)
                    state[weight] = made.dequantized(state[weight].dtype)


def _round_inputs(model: Any, shape: ModelShape, checkpoint: Checkpoint, linears: LinearFormat) -> None:
    assert linears.activations is not None
    for index, layer in enumerate(shape.layers):
        for linear in layer.linears:
            for name in (
                () if linear.kept else dict.fromkeys(layer_prefix(index) + part.tensor for part in linear.parts)
            ):
                rounding = _rounding(linears, checkpoint, linear, layer_prefix(index))
                model.get_submodule(name).register_forward_pre_hook(rounding)
        if layer.experts is not None and not layer.experts.kept:
            modules = model.get_submodule(layer_prefix(index).removesuffix(".")).named_modules()
            (experts,) = (module for name, module in modules if name.endswith(".experts"))
            experts.forward = _rounding_experts(experts, linears.activations.torch_dtype)


def _rounding_experts(experts: Any, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """What experts of Transformers do, all of a layer in one module, with the inputs of their products rounded."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        made = quantize_rows(x, dtype)
        return (widened(made.values) * made.scales).to(x.dtype)

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(rounded(hidden[token]), experts.gate_up_proj[expert]).chunk(2, dim=-1)
            made = F.linear(rounded(experts.act_fn(gate) * up), experts.down_proj[expert])
            out.index_add_(0, token, made * weights[token, place, None])
        return out

    return forward


def _rounding(
    linears: LinearFormat, checkpoint: Checkpoint, linear: LinearSpec, prefix: str
) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    """A hook that rounds a linear's input to what 8 bits can tell apart."""
    assert linears.activations is not None
    dtype = linears.activations.torch_dtype
    ranges = [checkpoint.input_range(prefix + part.tensor) for part in linear.parts] if linears.is_calibrated else []

    def hook(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x,) = inputs
        rows, offset = x.reshape(-1, x.shape[-1]), 0.0
        if ranges:
            offset = ranges[0][1]
            scale = torch.tensor([max(scale for scale, _ in ranges)], device=x.device)
            made = quantize_static(rows, scale, offset, dtype)
        else:
            made = quantize_rows(rows, dtype)
        return (((widened(made.values) - offset) * made.scales).to(x.dtype).view_as(x),)

    return hook


def rounding_cache(weights: Path, precision: Precision) -> Any:
    """A cache of Transformers whose keys and values are rounded as they are kept; None where they are kept plain."""
    if not precision.has_kv_scales:
        return None
    import transformers

    shape = load_model_shape(str(weights))
    static = open_checkpoint(weights, shape).kv_scales(range(shape.num_layers))
    kept = precision.kv.torch_dtype

    def rounded(numbers: torch.Tensor, scale: float | None) -> torch.Tensor:
        heads, length, head_dim = numbers.shape[1:]  # of one sequence
        size = (heads, length, head_dim)
        slab = QuantizedKV.zeros(size, kept=kept, dtype=numbers.dtype, device=numbers.device, static=scale)
        slab.write(slice(0, length), numbers[0])
        return slab.read(slice(0, length))[None]

    class RoundingCache(transformers.DynamicCache):  # type: ignore[misc]  # transformers has no types
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            scales = static[layer_idx] if static else (None, None)
            return super().update(rounded(keys, scales[0]), rounded(values, scales[1]), layer_idx, *args, **kwargs)

    return RoundingCache()


@torch.inference_mode()
def _check(model: Any, result: RequestResult, prompt: TokenIds, cache: Any) -> TokenCheck:
    input_ids = torch.tensor([prompt], device=model.device)
    made = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), past_key_values=cache)
    expected = tuple(made.sequences[0, len(prompt) :].tolist())
    if result.token_ids == expected:
        return TokenCheck(id=result.id, equal=True, expected=expected)
    pairs = enumerate(zip(result.token_ids, expected, strict=False))
    first = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(result.token_ids), len(expected)))
    margin = None
    if first < len(made.scores):
        top2 = made.scores[first][0].float().topk(2).values
        margin = float(top2[0] - top2[1])
    return TokenCheck(id=result.id, equal=False, expected=expected, first_mismatch=first, top2_margin=margin)

"""Makes an 8-bit checkpoint of a plain one: one layer in memory at a time, calibrated, smoothed, judged and written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from db.errors import UserError
from db.files.documents import read_json
from profiler.kernels.entry import Product
from profiler.kernels.linear import Linear
from profiler.kernels.quantized.linear import make_linear
from profiler.kernels.quantized.rounding import LARGEST, LEAST
from profiler.kernels.quantized.weight import QuantizedWeight, quantize_weight
from profiler.model import LayerSpec, ModelShape, Precision
from profiler.model.precision import BFLOAT16, precision_of, quantized_name
from profiler.model.shape import layer_prefix
from profiler.model.tensors import LinearSpec, NormSpec
from runtime.quantize.layers import Layer, Watched, perplexity_of
from runtime.quantize.ranges import InputRanges
from runtime.quantize.recipe import QuantizationRecipe
from runtime.quantize.report import LinearReport, QuantizeReport
from runtime.quantize.texts import HiddenStates
from runtime.quantize.writer import CheckpointWriter
from runtime.run.prompts import TokenIds
from runtime.weights.checkpoint import Checkpoint

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPERT_ROWS = 16  # of each call, that are sampled of an expert: there are many
_LEAST_FACTOR, _MOST_FACTOR = 1e-4, 1e4


class _Layer(Layer):
    """A layer being quantized, and what its inputs showed."""

    def __init__(self, index: int, spec: LayerSpec, checkpoint: Checkpoint) -> None:
        super().__init__(index, spec, checkpoint)
        all_tokens = {linear.name for linear in spec.linears}
        self.inputs = {
            linear.name: InputRanges() if linear.name in all_tokens else InputRanges(_EXPERT_ROWS)
            for linear in spec.every_linear
        }
        self.seen = dict[str, InputRanges]()  # the inputs before smoothing
        self.held_out = {linear.name: InputRanges(1) for linear in spec.every_linear}


@torch.inference_mode()
def quantize_checkpoint(
    source: Path,
    output: Path,
    shape: ModelShape,
    precision: Precision,
    recipe: QuantizationRecipe,
    *,
    calibration: Sequence[TokenIds] = (),
    held_out: Sequence[TokenIds] = (),
    device: torch.device,
    progress: Callable[[int], None] = lambda _layer: None,
    partial: Path | None = None,
    conclude: Callable[[QuantizeReport], None] = lambda _report: None,
) -> QuantizeReport:
    """Write the model at `source` to the folder `output` in 8 bits; `progress` is called with each layer that is done.

    partial: the folder that is written to first. conclude: called when all is there, before it is moved to `output`.

    Ranges come from `calibration`, run through the layers in full precision; `held_out` runs through both, in the very
    kernels that a run uses. Raises `UserError` for what cannot be done, and leaves nothing half-written.
    """
    started = time.monotonic()
    if output.exists():
        raise UserError("--output", output, "exists already: name a folder that does not")
    check_recipe(shape, recipe, calibration)
    config = read_json(source / "config.json", field="MODEL")
    checkpoint = Checkpoint(source, device=device, dtype=torch.float32)
    streams = {"calibration": calibration, "before": held_out, "after": held_out}
    states = {
        name: HiddenStates(
            sequences, shape, device, torch.float32,
            kv=recipe.kv.torch_dtype if recipe.kv is not None and name == "after" else None,
        )
        for name, sequences in streams.items()
        if sequences
    }  # fmt: skip
    reports: list[LinearReport] = []
    kept: list[str] = []
    with CheckpointWriter(output, source, partial) as writer:
        _begin(checkpoint, shape, states, writer)
        for index, spec in enumerate(shape.layers):
            done = _quantize_layer(index, spec, checkpoint, shape, recipe, states, writer)
            reports += done
            kept += [
                layer_prefix(index) + part.tensor
                for linear, report in zip(spec.every_linear, done, strict=True)
                for part in linear.parts
                if report.kept
            ]
            checkpoint.close()
            progress(index)
        before, after = (
            perplexity_of(states[name], checkpoint, shape) if name in states else None for name in ("before", "after")
        )
        _end(checkpoint, shape, writer)
        settings: dict[str, Any] = dict(config) | {
            "quantization_config": recipe.quantization_config(
                list(dict.fromkeys(kept)), has_kv_scales="calibration" in states
            )
        }
        report = QuantizeReport(
            model=shape.name,
            precision=quantized_name(recipe.linears, precision.activations, recipe.kv),
            folder=str(output),
            linears=tuple(reports),
            calibration_tokens=states["calibration"].num_tokens if calibration else 0,
            held_out_tokens=states["before"].num_tokens if held_out else 0,
            perplexity_before=before,
            perplexity_after=after,
            source_bytes=sum((source / file).stat().st_size for file in set(checkpoint.file_of.values())),
            written_bytes=writer.total_bytes,
            elapsed_s=time.monotonic() - started,
        )
        writer.finish(settings, before=lambda: conclude(report))
    return report


def check_recipe(shape: ModelShape, recipe: QuantizationRecipe, calibration: Sequence[TokenIds]) -> None:
    """Raise `UserError` for a recipe that this model does not allow."""
    shape.check_as_stored("MODEL", "quantized", with_experts=True)
    shape.check_precision(precision_of(quantized_name(recipe.linears, BFLOAT16, recipe.kv)), field="--precision")
    if shape.quantization is not None:
        raise UserError("MODEL", shape.name, "is quantized already: quantize the checkpoint that it was made from")
    if not calibration and (recipe.linears.is_calibrated or recipe.smooth is not None):
        what = "--smooth" if recipe.smooth is not None else "static ranges"
        raise UserError("--calibration", "missing", f"{what} need prompts to find ranges on")
    names = [
        layer_prefix(index) + part.tensor
        for index, layer in enumerate(shape.layers)
        for linear in layer.every_linear
        for part in linear.parts
    ]
    for pattern in recipe.keep:
        if not any(QuantizationRecipe(linears=recipe.linears, keep=(pattern,)).keeps(name) for name in names):
            raise UserError("--keep", pattern, f"fits no linear; there are {', '.join(names[:7])} and so on")
    if recipe.group_size is None:
        return
    if recipe.linears.activations is not None:
        raise UserError("--group-size", recipe.group_size, "only w8a16 has scales for groups of inputs")
    for linear in (linear for layer in shape.layer_kinds for linear in layer.every_linear):
        if linear.inputs.size % recipe.group_size:
            raise UserError("--group-size", recipe.group_size, f"must divide the {linear.inputs.size} inputs of all")


def _begin(
    checkpoint: Checkpoint, shape: ModelShape, states: dict[str, HiddenStates], writer: CheckpointWriter
) -> None:
    for name in shape.embedding.tensors():
        writer.add(name, checkpoint.raw(name))
    if states:
        embedding = checkpoint.read(next(iter(shape.embedding.tensors())))
        for stream in states.values():
            stream.embed(embedding)


def _end(checkpoint: Checkpoint, shape: ModelShape, writer: CheckpointWriter) -> None:
    for name in (*shape.final_norm.tensors(), *shape.head.tensors()):
        if name not in shape.embedding.tensors():
            writer.add(name, checkpoint.raw(name))


def _quantize_layer(
    index: int,
    spec: LayerSpec,
    checkpoint: Checkpoint,
    shape: ModelShape,
    recipe: QuantizationRecipe,
    states: dict[str, HiddenStates],
    writer: CheckpointWriter,
) -> list[LinearReport]:
    prefix = layer_prefix(index)
    layer = _Layer(index, spec, checkpoint)
    kept = {linear.name for linear in spec.every_linear if _is_kept(layer, linear, recipe)}
    plain = layer.products() if states else {}
    kv_scales: tuple[float, float] | None = None
    if "calibration" in states:
        recording = {name: Watched(product, layer.inputs[name].see) for name, product in plain.items()}
        ends = states["calibration"].run(layer.runner(shape, recording), spec)
        if recipe.kv is not None:
            largest = LARGEST[recipe.kv.torch_dtype]
            kv_scales = max(ends[0], LEAST) / largest, max(ends[1], LEAST) / largest
            for which, scale in zip("kv", kv_scales, strict=True):
                writer.add(f"{prefix}self_attn.{which}_scale", torch.tensor([scale]))
    if "before" in states:
        watched = {name: Watched(product, layer.held_out[name].see) for name, product in plain.items()}
        states["before"].run(layer.runner(shape, watched), spec)
    plain.clear()
    layer.seen = dict(layer.inputs)
    stored = {prefix + name: _DTYPES[checkpoint.format_of(prefix + name)] for name in spec.tensors()}
    if recipe.smooth is not None:
        # Behind the norm before experts stand the router and all of them: it stays as it is.
        into_mlp = () if spec.experts else ((spec.before_mlp, spec.dense.gate_up),)
        for norm, linear in ((spec.before_attention, spec.attention.qkv), *into_mlp):
            if norm is not None and linear.name not in kept:
                _smooth(layer, norm, linear, recipe.smooth, stored[layer.name(norm.tensor) + ".weight"])
    reports, products = [], dict[str, Product]()
    for linear in spec.every_linear:
        if linear.name in kept:
            product: Product | None = Linear(layer.weight(linear), layer.bias(linear)) if states else None
            error = 0.0
            for name in linear.tensors():
                writer.add(prefix + name, layer.tensors[prefix + name].to(stored[prefix + name]))
        else:
            product, error = _quantize_linear(layer, linear, recipe, stored, writer, runs=bool(states))
        reports.append(_judge(layer, linear, product, error, kept))
        if "after" in states and product is not None:
            products[linear.name] = product
        for name in linear.tensors():
            layer.tensors.pop(prefix + name, None)
    choice = spec.experts.router.bias if spec.experts else None
    for norm in (*spec.norms, *((choice,) if choice else ())):
        name = layer.name(norm.name)
        writer.add(name, layer.tensors[name].to(stored[name]))
    if "after" in states:
        states["after"].run(layer.runner(shape, products), spec, kv_scales)
    return reports


def _is_kept(layer: _Layer, linear: LinearSpec, recipe: QuantizationRecipe) -> bool:
    """Whether a linear stays plain: all its parts, for they run as one product."""
    return linear.kept or any(recipe.keeps(layer.name(part.tensor)) for part in linear.parts)


def _quantize_linear(
    layer: _Layer,
    linear: LinearSpec,
    recipe: QuantizationRecipe,
    stored: dict[str, torch.dtype],
    writer: CheckpointWriter,
    *,
    runs: bool,
) -> tuple[Product | None, float]:
    """The product in 8 bits if it `runs`, its tensors written, and the relative error of its weight."""
    dtype = recipe.linears.weights.torch_dtype
    scale, offset = None, 0.0
    if recipe.linears.is_calibrated:
        scale, offset = layer.inputs[linear.name].static(dtype, recipe.observer, asymmetric=recipe.asymmetric)
    made, lost, all_squares = [], 0.0, 0.0
    # Parts that lie in one tensor of the checkpoint stay together, in their order.
    for tensor in dict.fromkeys(part.tensor for part in linear.parts):
        name = layer.name(tensor)
        weight = layer.tensors[f"{name}.weight"]
        quantized = quantize_weight(weight, dtype, group_size=recipe.group_size, observer=recipe.observer)
        lost += quantized.error(weight)
        all_squares += float(weight.norm()) ** 2
        if recipe.is_packed:
            writer.add(f"{name}.weight_packed", packed(quantized.values))
            writer.add(f"{name}.weight_shape", torch.tensor(weight.shape))
        else:
            writer.add(f"{name}.weight", quantized.values)
        writer.add(f"{name}.weight_scale", quantized.scales)
        if scale is not None:
            writer.add(f"{name}.input_scale", scale)
            if recipe.asymmetric:
                writer.add(f"{name}.input_zero_point", torch.tensor([int(offset)], dtype=torch.int8))
        if linear.has_bias:
            writer.add(f"{name}.bias", layer.tensors[f"{name}.bias"].to(stored[f"{name}.bias"]))
        if runs:
            made.append(quantized)
        else:
            del layer.tensors[f"{name}.weight"]
    error = math.sqrt(lost / max(all_squares, 1e-30))
    if not runs:
        return None, error
    whole = QuantizedWeight(torch.cat([part.values for part in made]), torch.cat([part.scales for part in made]))
    return make_linear(whole, recipe.linears, layer.bias(linear), scale=scale, offset=offset), error


def packed(values: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] as int32 [N, K / 4]: four numbers a word, the first in its lowest byte, each with 128 added."""
    padded = F.pad(values, (0, -values.shape[1] % 4))
    return (padded.view(torch.uint8) ^ 0x80).contiguous().view(torch.int32)


def _smooth(layer: _Layer, norm: NormSpec, linear: LinearSpec, strength: float, dtype: torch.dtype) -> None:
    """SmoothQuant (Xiao et al., 2023): what widens a channel moves from the norm's weight into the linear's columns.

    The linear's factors are those by which the norm's weight really changed, rounded as it is stored.
    """
    ranges, weight = layer.inputs[linear.name], layer.weight(linear)
    ends, columns = ranges.channel_ends.clamp_min(1e-5), weight.abs().amax(dim=0).clamp_min(1e-5)
    factors = (ends.pow(strength) / columns.pow(1.0 - strength)).clamp(_LEAST_FACTOR, _MOST_FACTOR)
    before = layer.norm(norm)
    after = (before / factors).to(dtype).float()
    moved = torch.where(after == 0.0, torch.ones_like(after), before / after)
    layer.tensors[layer.name(norm.tensor) + ".weight"] = torch.where(after == 0.0, before, after)
    for part in linear.parts:
        name = layer.name(part.tensor) + ".weight"
        rows = slice(part.first_row, part.first_row + part.rows.size)
        layer.tensors[name][rows] *= moved
    layer.inputs[linear.name] = ranges.scaled(1.0 / moved)


def _judge(
    layer: _Layer, linear: LinearSpec, product: Product | None, weight_error: float, kept: set[str]
) -> LinearReport:
    seen, ranges = layer.seen[linear.name], layer.inputs[linear.name]
    output_error = None
    if ranges.num_tokens and product is not None:
        exact = F.linear(ranges.sample, layer.weight(linear), layer.bias(linear))
        output_error = float((product(ranges.sample) - exact).norm() / exact.norm())
    return LinearReport(
        layer=layer.index,
        linear=linear.name,
        kept=linear.name in kept,
        weight_error=weight_error,
        output_error=output_error,
        outlier_ratio=_outlier_ratio(seen),
        seen=seen.summary(),
        smoothed=None if ranges is seen else ranges.summary(),
        held_out=layer.held_out[linear.name].summary(),
    )


def _outlier_ratio(ranges: InputRanges) -> float | None:
    if not ranges.num_tokens:
        return None
    ends = ranges.channel_ends
    return float(ends.max() / ends.median().clamp_min(1e-12))

"""Reads checkpoints with 8-bit linears: values and scales, sliced for a rank, and a check that all are present."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from db.errors import UserError
from profiler.kernels.quantized.weight import QuantizedWeight
from profiler.model import ModelShape, Precision
from profiler.model.precision import E4M3, INT8
from profiler.model.quantization import Quantization, Storage
from profiler.model.shape import layer_prefix
from runtime.weights.checkpoint import ALL, Checkpoint

_WORD = 4  # numbers in an int32 of a packed weight
_FORMAT_OF = {INT8: "I8", E4M3: "F8_E4M3"}


def open_checkpoint(
    folder: Path, shape: ModelShape, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Checkpoint:
    """The weights at `folder`, quantized or not as their configuration says."""
    if shape.quantization is None:
        return Checkpoint(folder, device=device, dtype=dtype)
    return QuantizedCheckpoint(folder, shape.quantization, device=device, dtype=dtype)


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint with linears in 8 bits, in any layout that `Quantization` describes.

    A weight read as any other tensor is dequantized.
    """

    def __init__(
        self,
        folder: Path,
        quantization: Quantization,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(folder, device=device, dtype=dtype)
        self.quantization = quantization

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """See `Weights`."""
        linear = name.removesuffix(".weight")
        stored = self.stored(linear, rows, columns) if linear != name else None
        return super().read(name, rows, columns) if stored is None else stored.dequantized(self.dtype or torch.float32)

    def stored(self, name: str, rows: slice = ALL, columns: slice = ALL) -> QuantizedWeight | None:
        """See `Weights`. Raises `UserError` where a cut of the inputs goes through a group that shares a scale."""
        if not self.is_stored(name):
            return None
        n, k = self.weight_shape(name)
        first_row, last_row, _ = rows.indices(n)
        first, last, _ = columns.indices(k)
        values = self._values(name, slice(first_row, last_row), slice(first, last))
        scales = self.raw(self.scale_name(name)).float()
        every_row, every_column = self.quantization.scale_rows, self.quantization.scale_columns
        scales = scales.reshape(1, 1) if every_row is None else scales.view(scales.shape[0], -1)
        if every_row is None:
            scales = scales.expand(n, 1)
        elif every_row > 1:
            scales = scales.repeat_interleave(every_row, dim=0)
        scales = scales[first_row:last_row]
        if every_column is not None:
            if first % every_column or (last - first) % every_column:
                allowed = f"must be a multiple of {every_column}, which share a scale; run it with fewer ranks"
                raise UserError(name, f"{last - first} inputs a rank", allowed)
            scales = scales[:, first // every_column : last // every_column]
        return QuantizedWeight(values.to(self.device), scales.contiguous().to(self.device))

    def input_range(self, name: str) -> tuple[float, float]:
        """See `Weights`."""
        scale = float(self.raw(f"{name}.input_scale").reshape(-1)[0])
        offset = float(self.raw(f"{name}.input_zero_point").reshape(-1)[0]) if self.quantization.has_offset else 0.0
        return scale, offset

    def kv_scales(self, layers: Sequence[int]) -> list[tuple[float, float]] | None:
        """See `Weights`: as the configuration's `kv_cache_scheme` says."""
        if not self.quantization.has_kv_scales:
            return None
        names = [[kv_scale_name(layer, which) for which in ("k", "v")] for layer in layers]
        return [(float(self.raw(key).reshape(-1)[0]), float(self.raw(value).reshape(-1)[0])) for key, value in names]

    def is_stored(self, name: str) -> bool:
        """Whether the linear `name` is quantized, as its scales tell."""
        return self.scale_name(name) in self.file_of

    def scale_name(self, name: str) -> str:
        """The tensor of a linear's scales."""
        return f"{name}.weight_scale_inv" if self.quantization.storage is Storage.BLOCKS else f"{name}.weight_scale"

    def weight_name(self, name: str) -> str:
        """The tensor of a linear's values."""
        return f"{name}.weight_packed" if self.quantization.storage is Storage.PACKED else f"{name}.weight"

    def weight_shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a linear."""
        n, k = self.shape_of(self.weight_name(name))
        return n, k * (_WORD if self.quantization.storage is Storage.PACKED else 1)

    def _values(self, name: str, rows: slice, columns: slice) -> torch.Tensor:
        if self.quantization.storage is not Storage.PACKED:
            return self.raw(f"{name}.weight", rows, columns)
        first = columns.start // _WORD
        words = self.raw(f"{name}.weight_packed", rows, slice(first, -(-columns.stop // _WORD)))
        bytes_of = words.view(torch.uint8)[:, columns.start - first * _WORD : columns.stop - first * _WORD]
        return (bytes_of ^ 0x80).view(torch.int8).contiguous()


def kv_scale_name(layer: int, which: str) -> str:
    """The tensor with the scale of a layer's keys (k) or values (v)."""
    return f"{layer_prefix(layer)}self_attn.{which}_scale"


def check_checkpoint(folder: Path, shape: ModelShape, precision: Precision) -> None:
    """Raise `UserError` naming the first tensor that is missing, of another shape or format, or no scale.

    Reads headers, and the values of scales and ranges alone. `precision` is what the weights are to run in.
    """
    linears, quantization = precision.linears, shape.quantization
    if quantization is None:
        if linears is not None and linears.is_calibrated:
            allowed = "needs ranges of activations: calibrate the model first (isochunk quantize)"
            raise UserError("precision", precision.name, allowed)
        _check_plain(Checkpoint(folder), shape.tensors())
        return
    refusal = quantization.refusal(linears)
    if refusal is not None:
        raise UserError("precision", precision.name, refusal)
    checkpoint = QuantizedCheckpoint(folder, quantization)
    if quantization.has_kv_scales and precision.has_kv_scales:
        if quantization.kv != precision.kv:
            allowed = f"its keys and values have scales for {quantization.kv.name if quantization.kv else ''}"
            raise UserError("precision", precision.name, allowed)
        for layer in range(shape.num_layers):
            for which in ("k", "v"):
                _check_scales(checkpoint, kv_scale_name(layer, which))
    expected = shape.tensors()
    ranges = linears is not None and linears.is_calibrated
    kept = _kept_tensors(shape)
    for name in list(expected):
        linear = name.removesuffix(".weight")
        if len(expected[name]) == 2 and linear not in kept and checkpoint.is_stored(linear):
            _check_stored(checkpoint, linear, expected.pop(name), with_range=ranges)
    _check_plain(checkpoint, expected)


def _check_plain(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    for name, size in expected.items():
        _check_shape(checkpoint, name, size)
        if not checkpoint.is_float(name):
            allowed = "quantized weights need scales and a quantization_config that tells of them"
            raise UserError(name, "not floating point", allowed)


def _check_stored(checkpoint: QuantizedCheckpoint, name: str, size: tuple[int, ...], *, with_range: bool) -> None:
    n, k = size
    quantization = checkpoint.quantization
    packed = quantization.storage is Storage.PACKED
    weight = checkpoint.weight_name(name)
    _check_shape(checkpoint, weight, (n, -(-k // _WORD) if packed else k))
    found, expected = checkpoint.format_of(weight), "I32" if packed else _FORMAT_OF[quantization.weights]
    if found != expected:
        raise UserError(weight, found, f"must be {expected} by the configuration")
    scale, columns = checkpoint.scale_name(name), quantization.scale_columns
    if columns is not None and k % columns:
        raise UserError(weight, f"{k} inputs", f"must be a multiple of {columns}, which share a scale")
    if quantization.scale_rows is None:
        allowed_shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
    else:
        rows = -(-n // quantization.scale_rows)
        allowed_shapes = ((rows, 1 if columns is None else -(-k // columns)),)
        allowed_shapes += ((rows,),) if columns is None else ()
    if checkpoint.shape_of(scale) not in allowed_shapes:
        raise UserError(scale, f"shape {list(checkpoint.shape_of(scale))}", f"must be {list(allowed_shapes[0])}")
    _check_scales(checkpoint, scale)
    if with_range:
        _check_scales(checkpoint, f"{name}.input_scale")


def _check_scales(checkpoint: Checkpoint, name: str) -> None:
    if not checkpoint.is_float(name):
        raise UserError(name, checkpoint.format_of(name), "must be floating point")
    scales = checkpoint.raw(name).float()
    wrong = scales[~(torch.isfinite(scales) & (scales > 0))]
    if wrong.numel():
        raise UserError(name, float(wrong[0]), "scales must be finite and more than zero")


def _check_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> None:
    found = checkpoint.shape_of(name)
    if found != expected:
        raise UserError(name, f"shape {list(found)}", f"must be {list(expected)} by the configuration")


def _kept_tensors(shape: ModelShape) -> frozenset[str]:
    """Linears that the configuration says are plain, and the embedding."""
    kept = {part.tensor for part in shape.embedding.parts}
    assert shape.quantization is not None  # plain checkpoints are not asked
    for index, layer in enumerate(shape.layers):
        names = {layer_prefix(index) + part.tensor for linear in layer.linears if linear.kept for part in linear.parts}
        kept |= {name for name in names if shape.quantization.keep(name)}
    return frozenset(kept)

"""The weights of a model: a Hugging Face checkpoint read slice by slice, or random tensors of the same shapes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from db.errors import UserError
from db.files.documents import located, parse, read_json
from profiler.kernels.quantized.weight import QuantizedWeight
from profiler.model import ModelShape

ALL = slice(None)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RANDOM_RANGE = 4.0
RANDOM_STD = 0.02  # the usual initializer_range


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """`model.safetensors.index.json`: the file in the folder that holds each tensor."""

    weight_map: dict[str, str]

    def __post_init__(self) -> None:
        for name, file in self.weight_map.items():
            if file in ("", ".", "..") or "\0" in file or Path(file).name != file:
                raise UserError(f"weight_map.{name}", file, "must be the name of a file in the folder")


class WeightSource(Protocol):
    """A source of a rank's weights."""

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """A slice of a tensor, on the device and in the dtype of the run; `columns` only where there are any."""

    def stored(self, name: str, rows: slice = ALL, columns: slice = ALL) -> QuantizedWeight | None:
        """A slice of the weight of the linear `name` in 8 bits; None where it is kept plain."""

    def input_range(self, name: str) -> tuple[float, float]:
        """Scale and offset of the linear's input, found on a calibration set."""

    def kv_scales(self, layers: Sequence[int]) -> list[tuple[float, float]] | None:
        """Scales of the keys and the values of these layers, found on a calibration set; None where they are not."""


class Checkpoint:
    """A folder of safetensors, one file or several with an index; only the slices asked for are read."""

    def __init__(self, folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.file_of = _file_of_tensor(folder)
        self._open: dict[str, Any] = {}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """See `WeightSource`. Raises `UserError` when the checkpoint has no such tensor."""
        part = self._slice(name)
        tensor: torch.Tensor = part[rows] if len(part.get_shape()) == 1 else part[rows, columns]
        # The file is mapped: without a copy, a slice would keep its pages and their layout.
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def stored(self, name: str, rows: slice = ALL, columns: slice = ALL) -> QuantizedWeight | None:
        """See `WeightSource`: none is."""
        return None

    def input_range(self, name: str) -> tuple[float, float]:
        """See `WeightSource`: there is none."""
        raise UserError(f"{name}.input_scale", "missing", f"must be in the weights at {self.folder}")

    def kv_scales(self, layers: Sequence[int]) -> list[tuple[float, float]] | None:
        """See `WeightSource`: there are none."""
        return None

    def raw(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """A slice of a tensor as it lies in the file."""
        part = self._slice(name)
        sizes = part.get_shape()
        if not sizes:
            scalar: torch.Tensor = self._open[self.file_of[name]].get_tensor(name)
            return scalar
        tensor: torch.Tensor = part[rows] if len(sizes) == 1 else part[rows, columns]
        return tensor.contiguous()

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def is_float(self, name: str) -> bool:
        """Whether the tensor holds plain floating-point numbers, not quantized ones."""
        return self.format_of(name) in ("F64", "F32", "F16", "BF16")

    def format_of(self, name: str) -> str:
        """The format of a tensor's numbers, as the file's header names it."""
        return str(self._slice(name).get_dtype())

    def close(self) -> None:
        """Unmap the files and free the memory of their pages; they are opened again as needed."""
        self._open.clear()

    def _slice(self, name: str) -> Any:
        file = self.file_of.get(name)
        if file is None:
            raise UserError(name, "missing", f"must be in the weights at {self.folder}")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise UserError(name, file, f"must be readable from the weights at {self.folder} ({error})") from error


class RandomWeights:
    """Random weights: norms are one, the rest is normal; a slice is the same on every rank."""

    def __init__(self, shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> None:
        self.shapes, self.device, self.dtype = shape.tensors(), device, dtype

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """See `WeightSource`."""
        sizes = self.shapes[name]
        cuts = (rows, columns, *(ALL for _ in sizes[2:]))
        size = tuple(len(range(*part.indices(length))) for part, length in zip(cuts, sizes, strict=False))
        if name.endswith("norm.weight"):
            return torch.ones(size, device=self.device, dtype=self.dtype)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{name} {rows} {columns}".encode()))
        tensor = torch.empty(size, device=self.device, dtype=self.dtype)
        return tensor.normal_(std=RANDOM_STD, generator=generator)

    def stored(self, name: str, rows: slice = ALL, columns: slice = ALL) -> QuantizedWeight | None:
        """See `WeightSource`: none is."""
        return None

    def input_range(self, name: str) -> tuple[float, float]:
        """See `WeightSource`: one that normal data fill most of, in either format."""
        return RANDOM_RANGE / 127.0, 0.0

    def kv_scales(self, layers: Sequence[int]) -> list[tuple[float, float]] | None:
        """See `WeightSource`: there are none."""
        return None


def _file_of_tensor(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise UserError("weights", folder, "must be a folder with config.json and safetensors")
    if (folder / INDEX).is_file():
        content = read_json(folder / INDEX, field="weights")
        with located(folder / INDEX):
            return parse(WeightIndex, content).weight_map
    if not (folder / SINGLE).is_file():
        raise UserError("weights", folder, f"must hold {SINGLE}, or several files with {INDEX}")
    try:
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError) as error:
        raise UserError("weights", folder / SINGLE, f"must be a safetensors file ({error})") from error

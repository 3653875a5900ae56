"""How a checkpoint keeps its linears in 8 bits, as its configuration says; what cannot be read is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from db.errors import UserError
from profiler.model.precision import BFLOAT16, E4M3, FLOAT32, INT8, Format, LinearFormat, Ranges, quantized_name

FIELD = "quantization_config"
READABLE = (
    "compressed-tensors in 8 bits (int-quantized, float-quantized, naive-quantized, pack-quantized), "
    "fp8 with blocks of 128 x 128, ModelOpt's FP8, and unquantized checkpoints, which --dtype w8a8 or fp8 quantizes"
)
_INT8 = {"num_bits": 8, "type": "int"}
_FP8 = {"num_bits": 8, "type": "float"}
_TOKENS = {"strategy": "token", "dynamic": True}
# Schemes that compressed-tensors knows by name: weights and input activations.
_PRESETS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {
    "W8A16": (_INT8 | {"strategy": "channel"}, None),
    "W8A8": (_INT8 | {"strategy": "channel"}, _INT8 | _TOKENS),
    "INT8": (_INT8 | {"strategy": "channel"}, _INT8 | _TOKENS),
    "FP8": (_FP8 | {"strategy": "tensor"}, _FP8 | {"strategy": "tensor", "dynamic": False}),
    "FP8_DYNAMIC": (_FP8 | {"strategy": "channel"}, _FP8 | _TOKENS),
}
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")


class UnreadFormatError(UserError):
    """A format of weights that is not read: a model in it is planned as if it were converted."""


class Storage(StrEnum):
    """Under which names and in which order a linear's numbers lie in a checkpoint."""

    VALUES = "values"  # `weight` [n, k] in 8 bits, `weight_scale` for all, for each output or for groups of inputs
    PACKED = "packed"  # `weight_packed` [n, k / 4], four numbers in an int32, each with 128 added
    BLOCKS = "blocks"  # `weight` [n, k] in 8 bits, `weight_scale_inv` for blocks of outputs and inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a checkpoint's linears are quantized, and which are not.

    scale_rows, scale_columns: how many outputs and inputs share a scale; None: all.
    """

    method: str
    storage: Storage
    weights: Format
    activations: Format | None
    ranges: Ranges = Ranges.DYNAMIC
    has_offset: bool = False  # static ranges that do not begin at minus their end: `input_zero_point`
    scale_rows: int | None = 1
    scale_columns: int | None = None
    kv: Format | None = None  # of keys and values, where the checkpoint was made for 8 bits
    has_kv_scales: bool = False  # found on a calibration set: `k_scale` and `v_scale` of each layer
    keeps: tuple[str, ...] = ()  # patterns of names: "re:" and a regular expression, with wildcards, or whole

    @property
    def linears(self) -> LinearFormat:
        """In which format its linears run; weights whose inputs have scales of their own are dequantized first."""
        if self.activations is None or self.scale_columns is not None:
            return LinearFormat(INT8)
        return LinearFormat(self.weights, self.activations, self.ranges)

    def precision(self, around: Format = BFLOAT16) -> str:
        """Name of the precision that it was made for."""
        return quantized_name(self.linears, FLOAT32 if around == FLOAT32 else BFLOAT16, self.kv)

    def refusal(self, linears: LinearFormat | None) -> str | None:
        """Why products cannot run in `linears`, or None: weights are taken as they are, or dequantized."""
        mine = self.linears
        if linears is None or linears.activations is None or linears == mine:
            return None
        if self.scale_columns is not None:
            return "its weights have scales for groups of inputs: run it in w8a16 or in a plain precision"
        if linears.weights != self.weights:
            return f"its weights are {self.weights.name}: run it in {self.precision()} or in a plain precision"
        if linears.is_calibrated:
            return f"it holds no ranges of activations: run it in {self.precision()} or in a plain precision"
        return None

    def keep(self, name: str) -> bool:
        """Whether the linear `name` (without ".weight") is stored plain."""
        return any(_matches(pattern, name) for pattern in self.keeps)


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """What `quantization_config` says, or None without one; raises `UserError` for what cannot be read."""
    found = _found(config)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise UnreadFormatError(FIELD, found, f"cannot be read; what can: {READABLE}")
    method = str(found.get("quant_method") or ("modelopt" if "quant_algo" in found else "?"))
    match method:
        case "compressed-tensors":
            return _compressed_tensors(found)
        case "fp8":
            return _block_fp8(found)
        case "modelopt":
            return _modelopt(found)
    raise UnreadFormatError(FIELD, method, f"cannot be read; what can: {READABLE}")


def weight_format(config: Mapping[str, Any]) -> str:
    """What most people call the format of a checkpoint's linears: fp8, nvfp4, mxfp4, int4, ...; "" for plain ones."""
    found = _found(config)
    if not isinstance(found, Mapping):
        return str(found or "")
    method = str(found.get("quant_method") or "modelopt").lower()
    if method == "modelopt" or found.get("quant_algo"):
        algorithm = str(found.get("quant_algo") or "modelopt").lower()
        return "mixed" if algorithm.startswith("mixed") else algorithm.replace("w4a16_awq", "int4").split("_pb")[0]
    groups = found.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, Mapping):
        names = {_group_format(group) for group in groups.values()}
        return names.pop() if len(names) == 1 else "mixed"
    bits = found.get("bits")
    return f"int{bits}" if method in ("gptq", "awq") and bits else method


def _group_format(group: Any) -> str:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return "int8"
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if kind == "float" and bits == 4:
        return "mxfp4" if weights.get("group_size") == 32 else "nvfp4"
    return f"fp{bits}" if kind == "float" else f"int{bits}"


def _found(config: Mapping[str, Any]) -> Any:
    """What says how linears are quantized; a wrapper may leave it to its text decoder."""
    text = config.get("text_config")
    return config.get(FIELD) or (text.get(FIELD) if isinstance(text, Mapping) else None)


def with_sidecar(config: Mapping[str, Any], sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what ModelOpt's `hf_quant_config.json` says beside it, under the usual name."""
    inner = sidecar.get("quantization")
    if not isinstance(inner, Mapping):
        raise UserError("quantization", inner, "must be an object in hf_quant_config.json")
    return dict(config) | {FIELD: {"quant_method": "modelopt"} | dict(inner)}


def _compressed_tensors(found: Mapping[str, Any]) -> Quantization:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UserError(f"{FIELD}.config_groups", groups, "must be an object with a scheme")
    status = found.get("quantization_status", "compressed")
    if status != "compressed":
        raise UserError(f"{FIELD}.quantization_status", status, "must be compressed")
    schemes = [_scheme(name, group, found.get("format")) for name, group in groups.items()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise _refused("config_groups", f"{len(groups)} schemes that differ")
    weights, activations, file_format = schemes[0]
    storage = Storage.PACKED if file_format == "pack-quantized" else Storage.VALUES
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    columns = weights.get("group_size") if strategy == "group" else None
    rows: int | None = None if strategy == "tensor" else 1
    if strategy == "block":
        rows, columns = _blocks(weights.get("block_structure"))
    elif strategy not in ("tensor", "channel", "group"):
        raise _refused("weights.strategy", strategy)
    if columns is not None and (not _is_count(columns)):
        raise UserError(f"{FIELD}.weights.group_size", columns, "must be a whole number, 1 or more")
    if not weights.get("symmetric", True):
        raise _refused("weights.symmetric", "false")
    as_floats = _is_float(weights)
    taken, ranges, has_offset = _activations(activations)
    if taken is not None and taken != (E4M3 if as_floats else INT8):
        raise _refused("input_activations.type", "other than the weights'")
    if as_floats and storage is Storage.PACKED:
        raise _refused("format", "pack-quantized with type float")
    kv, has_kv_scales = _kv(found.get("kv_cache_scheme"))
    return Quantization(
        method="compressed-tensors",
        kv=kv,
        has_kv_scales=has_kv_scales,
        storage=storage,
        weights=E4M3 if as_floats else INT8,
        activations=taken,
        ranges=ranges,
        has_offset=has_offset,
        scale_rows=rows,
        scale_columns=columns,
        keeps=_names(found.get("ignore"), "ignore"),
    )


def _scheme(name: str, group: Any, file_format: Any) -> tuple[Mapping[str, Any], Mapping[str, Any] | None, str]:
    """Weights, input activations and file format of a group, which may be a preset's name and its targets."""
    if isinstance(group, list):
        if name.upper() not in _PRESETS:
            raise _refused("config_groups", name)
        weights, activations = _PRESETS[name.upper()]
        targets: Any = group
    elif isinstance(group, Mapping):
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        targets, file_format = group.get("targets", ["Linear"]), group.get("format") or file_format
        if group.get("output_activations"):
            raise _refused("output_activations", "8 bits")
    else:
        raise UserError(f"{FIELD}.config_groups.{name}", group, "must be an object")
    for field, value in (("weights", weights), ("input_activations", activations or {})):
        if not isinstance(value, Mapping):
            raise UserError(f"{FIELD}.config_groups.{name}.{field}", value, "must be an object")
    if targets != ["Linear"]:
        raise _refused("targets", targets)
    if weights.get("num_bits") != 8:
        raise _refused("weights.num_bits", weights.get("num_bits"))
    if file_format not in _FORMATS:
        raise _refused("format", file_format)
    return weights, activations, str(file_format)


def _activations(found: Mapping[str, Any] | None) -> tuple[Format | None, Ranges, bool]:
    if not found:
        return None, Ranges.DYNAMIC, False
    if found.get("num_bits") != 8:
        raise _refused("input_activations.num_bits", found.get("num_bits"))
    kind = E4M3 if _is_float(found) else INT8
    strategy, dynamic = found.get("strategy", "tensor"), found.get("dynamic", False)
    if dynamic is True and strategy == "token" and found.get("symmetric", True):
        return kind, Ranges.DYNAMIC, False
    if dynamic is False and strategy == "tensor":
        return kind, Ranges.STATIC, not found.get("symmetric", True)
    raise _refused("input_activations", f"{strategy}, dynamic {dynamic}, symmetric {found.get('symmetric', True)}")


def _kv(found: Any) -> tuple[Format | None, bool]:
    """`kv_cache_scheme`: the format of keys and values, and whether each layer has scales for them."""
    if not found:
        return None, False
    if not isinstance(found, Mapping):
        raise UserError(f"{FIELD}.kv_cache_scheme", found, "must be an object")
    if found.get("num_bits") != 8:
        raise _refused("kv_cache_scheme.num_bits", found.get("num_bits"))
    if not found.get("symmetric", True):
        raise _refused("kv_cache_scheme.symmetric", "false")
    kind = E4M3 if _is_float(found) else INT8
    if found.get("dynamic", False):
        return kind, False
    if found.get("strategy", "tensor") != "tensor":
        raise _refused("kv_cache_scheme.strategy", found.get("strategy"))
    return kind, True


def _block_fp8(found: Mapping[str, Any]) -> Quantization:
    if found.get("weight_block_size") is None:
        raise _refused("weight_block_size", "missing")
    rows, columns = _blocks(found["weight_block_size"])
    if found.get("fmt", "e4m3") != "e4m3":
        raise _refused("fmt", found["fmt"])
    return Quantization(
        method="fp8",
        storage=Storage.BLOCKS,
        weights=E4M3,
        activations=None,  # its activations are quantized in groups of inputs; here they stay in 16 bits
        scale_rows=rows,
        scale_columns=columns,
        keeps=("lm_head", *_names(found.get("modules_to_not_convert"), "modules_to_not_convert")),
    )


def _modelopt(found: Mapping[str, Any]) -> Quantization:
    algorithm = str(found.get("quant_algo"))
    if algorithm != "FP8":
        raise _refused("quant_algo", algorithm)
    names = found.get("exclude_modules", found.get("ignore"))
    return Quantization(
        method="modelopt",
        storage=Storage.VALUES,
        weights=E4M3,
        activations=E4M3,
        ranges=Ranges.STATIC,
        scale_rows=None,
        keeps=_names(names, "exclude_modules"),
    )


def _blocks(found: Any) -> tuple[int, int]:
    if not (isinstance(found, list) and len(found) == 2 and all(map(_is_count, found))):
        raise UserError(f"{FIELD}.weight_block_size", found, "must be two whole numbers")
    return found[0], found[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_float(found: Mapping[str, Any]) -> bool:
    kind = found.get("type", "int")
    if kind not in ("int", "float"):
        raise _refused("type", kind)
    return bool(kind == "float")


def _names(found: Any, field: str) -> tuple[str, ...]:
    if not isinstance(found or [], list):
        raise UserError(f"{FIELD}.{field}", found, "must be a list of names")
    return tuple(map(str, found or []))


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise UserError(f"{FIELD}.ignore", pattern, f"must be a regular expression ({error})") from None
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _refused(field: str, value: object) -> UnreadFormatError:
    return UnreadFormatError(f"{FIELD}.{field}", value, f"cannot be read; what can: {READABLE}")

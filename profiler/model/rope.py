"""Rotary embedding in a configuration: which kinds can be run, and the numbers that each is computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from db.errors import UserError
from profiler.model.fields import KernelsMissingError, positive, positive_number

# Types whose frequencies do not change with the length of the prompt: a chunk must see the same rotation as the whole.
SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale",
)  # fmt: skip
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


LOCAL = "sliding_attention"  # layers whose rotation may have a base of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How a layer turns its queries and keys.

    layer_type: whose parameters, where types of layers differ in them. features: of each head, the first ones that are
    turned; None for all. is_off: nothing is turned.
    """

    layer_type: str = ""
    features: int | None = None
    is_off: bool = False


WHOLE_HEADS = Rotation()


def rope_parameters(config: Mapping[str, Any], layer_type: str = "") -> dict[str, Any]:
    """The numbers of a rotation, under their newer name (`rope_parameters`) or older ones: of a type, or of all."""
    for field in ("rope_parameters", "rope_scaling"):
        if config.get(field) and not isinstance(config[field], Mapping):
            raise UserError(field, config[field], "must be an object or null in config.json")
    nested = (config.get("rope_parameters") or {}).get(layer_type)
    if isinstance(nested, Mapping):
        return dict(nested)
    if layer_type == LOCAL:  # scaling is for layers that see far
        base = config.get("rope_local_base_freq") or config.get("rope_theta")
        return {} if base is None else {"rope_theta": base}
    flat = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {name: value for name, value in flat.items() if not isinstance(value, Mapping)}


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies lengths with that are stretched `factor` times."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rope_type(config: Mapping[str, Any], layer_type: str = "") -> str:
    """The rotary scaling's type."""
    scaling = rope_parameters(config, layer_type)
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def head_order(head_dim: int, *, features: int | None = None, interleaved: bool = False) -> tuple[int, ...] | None:
    """A head's features in the order in which the kernels here turn them: the i-th with the one half a head further.

    features: how many of the first are turned; the rest meet one another and are turned by nothing. interleaved: pairs
    lie side by side in the checkpoint, else half of those features apart. None where the order is the same.
    """
    turned = head_dim if features is None else features
    half, rest = turned // 2, list(range(turned, head_dim))
    first = [2 * index for index in range(half)] if interleaved else list(range(half))
    second = [index + (1 if interleaved else half) for index in first]
    middle = len(rest) // 2
    order = (*first, *rest[:middle], *second, *rest[middle:])
    return None if order == tuple(range(head_dim)) else order


def longest_prompt(config: Mapping[str, Any]) -> int:
    """Positions that the rotation is made for: `max_position_embeddings`, or what YaRN stretches them to.

    Configurations differ in what the first counts: with scaling (DeepSeek) or without (Qwen). The scaled length is
    `factor` times `original_max_position_embeddings`, which Transformers takes from the first where it is missing.
    """
    written = positive(config, "max_position_embeddings")
    if rope_type(config) != "yarn":
        return written
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    original, factor = given.get("original_max_position_embeddings") or written, given.get("factor") or 1.0
    if not (isinstance(factor, int | float) and isinstance(original, int | float)):
        return written
    return max(written, int(factor * original))


def check_rope(config: Mapping[str, Any], rotations: Iterable[Rotation] = (WHOLE_HEADS,)) -> None:
    """Raise `UserError` for a rotation that cannot be run exactly, or for a number that it lacks."""
    for name in ("rope_theta", "rope_local_base_freq"):
        if config.get(name) is not None:
            positive_number(name, config[name])
    for rotation in rotations:
        if not rotation.is_off:
            _check_rotation(config, rotation)


def _check_rotation(config: Mapping[str, Any], rotation: Rotation) -> None:
    kind = rope_type(config, rotation.layer_type)
    if kind not in SUPPORTED_TYPES:
        raise KernelsMissingError("rope_scaling", kind, "supported types are " + ", ".join(SUPPORTED_TYPES))
    parameters = rope_parameters(config, rotation.layer_type)
    if parameters.get("llama_4_scaling_beta"):
        raise KernelsMissingError("llama_4_scaling_beta", parameters["llama_4_scaling_beta"], "must be null")
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = {name: value for name, value in parameters.items() if name in _NUMBERS and value is not None}
    for name, value in given.items():
        positive_number(f"{field}.{name}", value)
    if kind == "yarn":
        _check_yarn(config, field, parameters)
    for name in _NEEDED.get(kind, ()):
        if name not in given:
            raise UserError(f"rope_scaling.{name}", "missing", f"rotary scaling of type {kind} needs it")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        allowed = f"must be above low_freq_factor = {given['low_freq_factor']}"
        raise UserError("rope_scaling.high_freq_factor", given["high_freq_factor"], allowed)
    if rotation.features is None and turned_share(config) != 1.0:
        allowed = "whole heads are rotated in this architecture; must be 1 or null"
        raise KernelsMissingError("partial_rotary_factor", turned_share(config), allowed)


def _check_yarn(config: Mapping[str, Any], field: str, parameters: Mapping[str, Any]) -> None:
    if (scale := parameters.get("mscale_all_dim")) is not None and scale != 0:
        positive_number(f"{field}.mscale_all_dim", scale)
    for name, theta in (
        (f"{field}.rope_theta", parameters.get("rope_theta")),
        ("rope_theta", config.get("rope_theta")),
    ):
        if theta is not None and theta <= 1:
            raise UserError(name, theta, "must be above 1")


def turned_share(config: Mapping[str, Any], default: float = 1.0) -> float:
    """Of each head's features, those that are turned."""
    for source in (rope_parameters(config), config):
        if source.get("partial_rotary_factor") is not None:
            return positive_number("partial_rotary_factor", source["partial_rotary_factor"])
    return default

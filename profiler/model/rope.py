"""Rotary embedding in a configuration: which kinds can be run, and the numbers that each is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from db.errors import UserError
from profiler.model.fields import KernelsMissingError, positive, positive_number

# Types whose frequencies do not change with the length of the prompt: a chunk must see the same rotation as the whole.
SUPPORTED_TYPES = ("default", "linear", "llama3", "yarn")
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow",
)  # fmt: skip
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def rope_type(config: Mapping[str, Any]) -> str:
    """The rotary scaling's type, under its newer name (`rope_parameters`) or its older ones."""
    for field in ("rope_parameters", "rope_scaling"):
        if config.get(field) and not isinstance(config[field], Mapping):
            raise UserError(field, config[field], "must be an object or null in config.json")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(scaling.get("rope_type", scaling.get("type", "default")))


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


def check_rope(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a rotation that cannot be run exactly, or for a number that it lacks."""
    kind = rope_type(config)
    if kind not in SUPPORTED_TYPES:
        raise KernelsMissingError("rope_scaling", kind, "supported types are " + ", ".join(SUPPORTED_TYPES))
    if config.get("rope_theta") is not None:
        positive_number("rope_theta", config["rope_theta"])
    given: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        for name, value in (config.get(field) or {}).items():
            if name in _NUMBERS and value is not None:
                positive_number(f"{field}.{name}", value)
                given[name] = value
    for name in _NEEDED.get(kind, ()):
        if name not in given:
            raise UserError(f"rope_scaling.{name}", "missing", f"rotary scaling of type {kind} needs it")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        allowed = f"must be above low_freq_factor = {given['low_freq_factor']}"
        raise UserError("rope_scaling.high_freq_factor", given["high_freq_factor"], allowed)
    for source in (config, config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        share = source.get("partial_rotary_factor")
        if share not in (None, 1):
            raise KernelsMissingError("partial_rotary_factor", share, "only whole heads are rotated; must be 1 or null")

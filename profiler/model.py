"""The typed door for Hugging Face configurations: what a decoder's shape is, and which shapes can be run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from db.documents import located, parse, read_json
from db.errors import UserError
from db.json_text import parse_json

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Types whose frequencies do not change with the length of the prompt: a chunk must see the same rotation as the whole.
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow",
)  # fmt: skip
_ROPE_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_MAX_NUMBER = 1e15
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 10_000
MAX_SIZE = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only transformer, read from a Hugging Face `config.json`.

    `config` keeps the file's content: the runtime takes rotary scaling from it, plans carry it.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_eps: float
    dtype: str
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str) -> ModelShape:
        """Read a configuration; raises `UserError` that names the field for anything that cannot be run exactly."""
        _refuse_unsupported(config)
        _check_rope(config)
        architecture = _architecture(config)
        heads = _positive(config, "num_attention_heads")
        kv_heads = _positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError("num_key_value_heads", kv_heads, f"must divide num_attention_heads = {heads}")
        hidden = _positive(config, "hidden_size")
        head_dim = _positive(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise UserError("head_dim", head_dim, "must be even: the rotation turns its numbers in pairs")
        bias = bool(config.get("attention_bias", False))
        return cls(
            name=name,
            architecture=architecture,
            num_layers=_positive(config, "num_hidden_layers", most=MAX_LAYERS),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(config, "vocab_size"),
            max_positions=_positive(config, "max_position_embeddings"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            norm_eps=_positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            dtype=_dtype(config),
            config=dict(config),
        )

    @property
    def fingerprint(self) -> str:
        """Short hash of the sizes that decide a kernel's work; two checkpoints of one shape share measurements."""
        sizes = (
            self.architecture, self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads,
            self.num_kv_heads, self.head_dim, self.vocab_size, self.qkv_bias, self.o_bias, self.mlp_bias, self.qk_norm,
        )  # fmt: skip
        return hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, norms and biases included."""
        d, h, kv, hidden, ffn = (
            self.head_dim,
            self.num_heads,
            self.num_kv_heads,
            self.hidden_size,
            self.intermediate_size,
        )
        weights = hidden * d * (h + 2 * kv) + h * d * hidden + 3 * hidden * ffn
        biases = self.qkv_bias * d * (h + 2 * kv) + self.o_bias * hidden + self.mlp_bias * (2 * ffn + hidden)
        return weights + biases + 2 * hidden + self.qk_norm * 2 * d

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.layer_parameters + ends + self.hidden_size

    def kv_heads_per_rank(self, tp_size: int) -> int:
        """KV heads that one of `tp_size` ranks holds; they are replicated when there are fewer heads than ranks."""
        return max(1, self.num_kv_heads // tp_size)

    def check_tp_size(self, tp_size: int) -> None:
        """Raise `UserError` unless heads, KV heads and the FFN can be split over `tp_size` ranks."""
        if tp_size < 1 or self.num_heads % tp_size:
            raise UserError("tp_size", tp_size, f"must divide num_attention_heads = {self.num_heads} of {self.name}")
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            allowed = f"must divide, or be a multiple of, num_key_value_heads = {self.num_kv_heads} of {self.name}"
            raise UserError("tp_size", tp_size, allowed)
        if self.intermediate_size % tp_size:
            raise UserError(
                "tp_size", tp_size, f"must divide intermediate_size = {self.intermediate_size} of {self.name}"
            )


def bundled_names() -> list[str]:
    """Names of the shapes that come with isochunk (sizes only, no weights)."""
    return sorted(path.name.removesuffix(".json") for path in files("profiler").joinpath("shapes").iterdir())


def load_model_shape(model: str) -> ModelShape:
    """Read the shape of MODEL: a folder with a `config.json`, or the name of a bundled shape."""
    if model in bundled_names():
        data = files("profiler").joinpath("shapes", f"{model}.json").read_bytes()
        return ModelShape.from_config(parse_json(data, "MODEL", model), name=model)
    folder = Path(model)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("MODEL", model, "must be a folder with a config.json, or one of " + ", ".join(bundled_names()))
    content = read_json(path, field="MODEL")
    with located(path):
        return ModelShape.from_config(parse(dict[str, Any], content), name=folder.resolve().name)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Anything that would run and be wrong is refused here, by name."""
    architecture = _architecture(config)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UserError("architectures", architecture, "supported are " + ", ".join(SUPPORTED_ARCHITECTURES))
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise UserError("layer_types", layer_types, "must be a list in config.json")
    for kind in layer_types:
        if kind != "full_attention":
            raise UserError("layer_types", kind, "only full_attention layers are supported")
    sliding = config.get("sliding_window") is not None and (
        architecture == "MistralForCausalLM" or config.get("use_sliding_window", False)
    )
    if sliding:
        raise UserError(
            "sliding_window", config["sliding_window"], "sliding-window attention is not supported; must be null"
        )
    if config.get("quantization_config"):
        found = config["quantization_config"]
        method = found.get("quant_method", "?") if isinstance(found, Mapping) else found
        raise UserError("quantization_config", method, "quantized checkpoints are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError("hidden_act", config["hidden_act"], "only silu is supported")
    if rope_type(config) not in SUPPORTED_ROPE_TYPES:
        raise UserError("rope_scaling", rope_type(config), "supported types are " + ", ".join(SUPPORTED_ROPE_TYPES))


def _architecture(config: Mapping[str, Any]) -> Any:
    found = config.get("architectures")
    return found[0] if isinstance(found, list) and found else found


def _check_rope(config: Mapping[str, Any]) -> None:
    """Numbers that the rotation is computed from; Transformers' names of each type's own."""
    if config.get("rope_theta") is not None:
        _positive_number("rope_theta", config["rope_theta"])
    given: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        entry = config.get(field) or {}
        for name, value in entry.items():
            if name in _ROPE_NUMBERS and value is not None:
                _positive_number(f"{field}.{name}", value)
                given[name] = value
    kind = rope_type(config)
    for name in _ROPE_NEEDED.get(kind, ()):
        if name not in given:
            raise UserError(f"rope_scaling.{name}", "missing", f"rotary scaling of type {kind} needs it")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        allowed = f"must be above low_freq_factor = {given['low_freq_factor']}"
        raise UserError("rope_scaling.high_freq_factor", given["high_freq_factor"], allowed)


def rope_type(config: Mapping[str, Any]) -> str:
    """The rotary scaling's type, under its newer name (`rope_parameters`) or its older ones."""
    for field in ("rope_parameters", "rope_scaling"):
        if config.get(field) and not isinstance(config[field], Mapping):
            raise UserError(field, config[field], "must be an object or null in config.json")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _positive(config: Mapping[str, Any], field: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(field, value, "must be a positive integer in config.json")
    if value > most:
        raise UserError(field, value, f"must be at most {most}")
    return value


def _positive_number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_NUMBER:
        raise UserError(field, value, f"must be a number above 0, at most {_MAX_NUMBER:g}, in config.json")
    return float(value)


def _dtype(config: Mapping[str, Any]) -> str:
    value = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if value not in SUPPORTED_DTYPES:
        raise UserError("dtype", value, "supported are " + ", ".join(SUPPORTED_DTYPES))
    return value

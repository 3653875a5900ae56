from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from profiler.model import Backend, bundled_names, load_model_shape, model_from_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def test_every_bundled_shape_is_read() -> None:
    assert {"llama-3-8b", "llama-3-70b", "qwen3-8b", "qwen3-32b"} <= set(bundled_names())
    billions = {name: load_model_shape(name).num_parameters / 1e9 for name in bundled_names()}
    assert billions["llama-3-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["llama-3-70b"] == pytest.approx(70.55, abs=0.01)
    assert billions["qwen3-32b"] == pytest.approx(32.76, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "architectures: NoSuchForCausalLM; is no decoder of Transformers"),
        ({"architectures": []}, "architectures: "),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: sliding_attention; only full_attention",
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window: -1; must be a positive"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
            "rope_scaling: longrope; supported types are",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling: yarn; only default",
        ),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor: 0.75; "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5; "),
        ({"hidden_act": "gelu"}, "hidden_act: gelu; only silu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: dynamic; supported types are"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4; must divide num_attention_heads = 6"),
        ({"hidden_size": -1}, "hidden_size: -1; must be a positive integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: None; must be a positive integer"),
        ({"torch_dtype": "int4"}, "dtype: int4; supported are"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000; must be at most 10000"),
        ({"vocab_size": 2**31}, "vocab_size: 2147483648; must be at most 1073741824"),
        ({"hidden_size": 10**400}, "hidden_size: 1000"),
        ({"rms_norm_eps": None}, "rms_norm_eps: None; must be a number above 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: small; must be a number above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: nan; must be a number above 0"),
        ({"rope_theta": math.nan}, "rope_theta: nan; must be a number above 0"),
        ({"rope_theta": [1]}, "rope_theta: [1]; must be a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta: 1000"),
        ({"rope_scaling": "linear"}, "rope_scaling: linear; must be an object or null"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor: 4; must be a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "rope_parameters.factor: 0; must be a number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing; rotary scaling of type linear"),
        ({"layer_types": 5}, "layer_types: 5; must be a list"),
        ({"head_dim": 15}, "head_dim: 15; must be even"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    backend = "auto" if message.startswith("architectures") else "own"
    with pytest.raises(UserError) as refused:
        model_from_config(LLAMA | change, name="m", backend=backend)
    assert str(refused.value).startswith(message)


def test_what_kernels_here_lack_transformers_runs() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    mistral = LLAMA | heads | {"architectures": ["MistralForCausalLM"], "sliding_window": 96}
    assert model_from_config(mistral, name="m").backend is Backend.OWN
    shape = model_from_config(mistral, name="m", device_type="cuda")
    assert shape.backend is Backend.TRANSFORMERS
    assert {layer.window for layer in shape.every_layer} == {96}
    with pytest.raises(UserError, match=r"^MODEL: m; MistralForCausalLM has layers without kernels here"):
        _ = shape.layers
    turning = LLAMA | heads | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    planned = model_from_config(turning, name="m")
    assert planned.backend is Backend.PLANNING
    assert "rotation changes with the prompt's length" in str(planned.unrun)


@pytest.mark.parametrize("tp_size", [0, 4, 5])
def test_tensor_parallel_sizes_that_do_not_divide(tp_size: int) -> None:
    with pytest.raises(UserError, match=rf"^tp_size: {tp_size}; must divide"):
        model_from_config(LLAMA, name="m").check_tp_size(tp_size)


@pytest.mark.parametrize("content", [None, "not json", "[1]", "[" * 100_000], ids=["none", "text", "list", "deep"])
def test_folders_without_a_configuration(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^MODEL: .*must |config.json: content: ") as refused:
        load_model_shape(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_an_architecture_that_is_no_list_is_read() -> None:
    shape = model_from_config(LLAMA | {"architectures": "LlamaForCausalLM"}, name="m")
    assert shape.architecture == "LlamaForCausalLM"


def test_older_and_newer_names_of_one_thing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": "bfloat16"}))
    older = load_model_shape(str(tmp_path))
    newer = model_from_config(LLAMA | {"dtype": "bfloat16"}, name="other")
    assert older.dtype == newer.dtype == "bfloat16"
    assert older.fingerprint == newer.fingerprint


@pytest.mark.parametrize(
    ("change", "positions"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 10}}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 512),
    ],
)
def test_the_longest_prompt_is_what_the_rotation_is_stretched_to(change: dict[str, Any], positions: int) -> None:
    shape = model_from_config(LLAMA | change, name="test")
    assert shape.max_positions == positions
    assert "rope_scaling" in shape.positions_words

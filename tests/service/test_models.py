"""Published configurations as they are described: parameters, kinds of layers, what is kept of a token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from db.errors import UserError
from profiler.model import PRECISIONS, Backend, ModelShape, load_model_shape
from profiler.model.flops import prefill_flops
from profiler.model.whole.layer import seen_pairs
from service.use_cases.models import model_report

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# Billions of parameters that their publishers name; numbers that are kept of a token in all layers whose context grows.
PUBLISHED = {
    "DeepSeek-V3": (671.0, Backend.OWN, "fp8", 61 * 576),
    "GLM-5.1": (744.0, Backend.TRANSFORMERS, "bfloat16", 78 * (576 + 128)),
    "Kimi-K2-Instruct": (1026.4, Backend.OWN, "fp8", 61 * 576),
    "Llama-3.1-70B-Instruct-FP8": (70.55, Backend.OWN, "fp8", 80 * 2048),
    "Llama-3_3-Nemotron-Super-49B-v1": (49.87, Backend.PLANNING, "bfloat16", 49 * 2048),
    "Llama-4-Scout-17B-16E-Instruct": (108.6, Backend.TRANSFORMERS, "bfloat16", 12 * 2048),
    "Meta-Llama-3.1-70B": (70.55, Backend.OWN, "bfloat16", 80 * 2048),
    "MiMo-7B-Base": (7.62, Backend.OWN, "bfloat16", 36 * 2048),
    "MiniMax-M2.5": (228.7, Backend.TRANSFORMERS, "fp8", 62 * 2048),
    "Mixtral-8x7B-v0.1": (46.7, Backend.OWN, "bfloat16", 32 * 2048),
    "Qwen3-30B-A3B": (30.5, Backend.OWN, "bfloat16", 48 * 1024),
    "Qwen3-32B-FP8-Static-PerTensor": (32.76, Backend.OWN, "fp8", 64 * 2048),
    "Qwen3-32B-FP8": (32.76, Backend.OWN, "fp8", 64 * 2048),
    "Qwen3-VL-8B-Instruct": (8.77, Backend.TRANSFORMERS, "bfloat16", 36 * 2048),
    "gemma-4-26B-A4B": (25.8, Backend.TRANSFORMERS, "bfloat16", 5 * 2048),
    "gpt-oss-20b": (20.9, Backend.TRANSFORMERS, "mxfp4", 12 * 1024),
}


def folder_of(name: str, tmp_path: Path) -> Path:
    """The configuration as it lies in a repository."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(CONFIGS / f"{name}.config.json", folder / "config.json")
    sidecar = CONFIGS / f"{name}.hf_quant_config.json"
    if sidecar.is_file():
        shutil.copy(sidecar, folder / "hf_quant_config.json")
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str, tmp_path: Path) -> None:
    billions, backend, weights, kept = PUBLISHED[name]
    report = model_report(str(folder_of(name, tmp_path)))
    assert (report.backend, report.format) == (backend, weights)
    assert report.parameters is not None
    assert report.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert report.kv_bytes_a_token == 2 * kept
    assert sum(kind.layers for kind in report.kinds) == report.layers
    assert (report.reason is None) == (backend is not Backend.PLANNING)


def test_kinds_of_layers_are_told_apart(tmp_path: Path) -> None:
    def kinds(name: str) -> dict[str, int]:
        return {kind.kind: kind.layers for kind in model_report(str(folder_of(name, tmp_path))).kinds}

    assert kinds("gpt-oss-20b") == {
        "sliding window 128, sinks, 4 of 32 experts": 12,
        "full attention, sinks, 4 of 32 experts": 12,
    }
    latent = "latent attention, 2048 selected keys"
    assert kinds("GLM-5.1") == {latent: 3, f"{latent}, 8 of 256 experts and shared": 75}
    assert kinds("Llama-4-Scout-17B-16E-Instruct") == {
        "attention in blocks 8192, 1 of 16 experts and shared": 36,
        "full attention, 1 of 16 experts and shared": 12,
    }


def test_active_parameters_and_flops_of_experts(tmp_path: Path) -> None:
    path = folder_of("DeepSeek-V3", tmp_path)
    report, shape = model_report(str(path)), load_model_shape(str(path))
    assert report.active_parameters is not None
    assert report.active_parameters / 1e9 == pytest.approx(37.5, rel=0.01)
    one_token = prefill_flops(shape, [(1, 0)], 1) / 2
    embedding = 129280 * 7168  # looked up, not multiplied
    assert one_token == pytest.approx(report.active_parameters - embedding, rel=0.01)


def test_windows_bound_work_and_what_is_kept(tmp_path: Path) -> None:
    shape: ModelShape = load_model_shape(str(folder_of("gpt-oss-20b", tmp_path)))
    windowed, full = shape.every_kind[:2]
    assert (windowed.window, full.window) == (128, None)
    assert windowed.attention_flops(64, 4096) == windowed.attention_flops(64, 8192)
    assert full.attention_flops(64, 8192) > 1.9 * full.attention_flops(64, 4096)
    for chunk, context, most in ((5, 0, 3), (4, 2, 3), (7, 10, 3), (3, 1, 100), (1, 0, 1)):
        pairs = sum(min(context + query + 1, most) for query in range(chunk))
        assert seen_pairs(chunk, context, most) == pairs
    halved = windowed.weights_bytes(PRECISIONS["fp8"]) / windowed.weights_bytes(PRECISIONS["bfloat16"])
    assert halved == pytest.approx(0.5, abs=0.01)


def test_own_kernels_on_a_cpu_are_not_taken_for_cards(tmp_path: Path) -> None:
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "max_position_embeddings": 512, "sliding_window": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_model_shape(str(tmp_path))
    assert (shape.backend, shape.layer.kind) == (Backend.OWN, "sliding window 64")
    assert load_model_shape(str(tmp_path), device_type="cuda").backend is Backend.TRANSFORMERS
    with pytest.raises(UserError, match="sliding windows on CPUs alone"):
        load_model_shape(str(tmp_path), backend="own", device_type="cuda")


@pytest.mark.parametrize(("name", "dense"), [("DeepSeek-V3", 3), ("Kimi-K2-Instruct", 1)])
def test_latent_attention_runs_on_own_kernels_on_a_cpu_alone(name: str, dense: int, tmp_path: Path) -> None:
    path = folder_of(name, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    per_token, count = config["num_experts_per_tok"], config["n_routed_experts"]
    report = model_report(str(path.parent))
    assert report.backend is Backend.OWN
    assert {kind.kind: kind.layers for kind in report.kinds} == {
        "latent attention": dense,
        f"latent attention, {per_token} of {count} experts and shared": 61 - dense,
    }
    assert load_model_shape(str(path.parent), device_type="cuda").backend is Backend.TRANSFORMERS


def test_what_is_not_supported_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "no_such"}')
    report = model_report(str(tmp_path))
    assert report.backend == "refused"
    assert "architectures: NoSuchForCausalLM; is no decoder of Transformers" in str(report.reason)

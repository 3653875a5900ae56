"""Published layouts of 8-bit checkpoints, made small: read whole, cut, and refused where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.kernels.quantized.rounding import LARGEST, rounded
from profiler.kernels.quantized.weight import quantize_weight
from profiler.model import PRECISIONS, load_model_shape
from runtime.quantize.quantize import packed
from runtime.weights.quantized import QuantizedCheckpoint, check_checkpoint, open_checkpoint

NAME = "model.layers.1.mlp.down_proj"  # [64, 112]
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(file_format: str, weights: Any, activations: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": file_format, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip


def int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    made = quantize_weight(weight, torch.int8)
    return {"weight": made.values, "weight_scale": made.scales.bfloat16()}


def packed_groups(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    made = quantize_weight(weight, torch.int8, group_size=16)
    return {
        "weight_packed": packed(made.values), "weight_scale": made.scales, "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip


def blocks(weight: torch.Tensor, size: int = 16) -> dict[str, torch.Tensor]:
    n, k = weight.shape
    rows = torch.nn.functional.pad(weight, (0, 0, 0, -n % size))  # the last block may have fewer
    ends = rows.view(-1, size, k // size, size).abs().amax(dim=(1, 3))
    scales = ends / LARGEST[torch.float8_e4m3fn]
    whole = scales.repeat_interleave(size, 0)[:n].repeat_interleave(size, 1)
    return {"weight": rounded(weight / whole, torch.float8_e4m3fn), "weight_scale_inv": scales}


def per_tensor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / 448.0
    values = rounded(weight / scale, torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.tensor(0.02)}


LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], dict[str, Any] | None, str]] = {
    "int8 W8A8": (int8, compressed("int-quantized", CHANNEL, TOKEN), "w8a8"),
    "int8 groups": (
        packed_groups,
        compressed("pack-quantized", CHANNEL | {"strategy": "group", "group_size": 16}, None),
        "w8a16",
    ),
    "fp8 blocks": (blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}, "w8a16"),
    "ModelOpt FP8": (per_tensor, None, "fp8-static"),
}
DEEPSEEK = "fp8 blocks of 128"
PUBLISHED = LAYOUTS | {
    DEEPSEEK: (
        partial(blocks, size=128),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "w8a16",
    )
}


def publish(
    source: Path,
    folder: Path,
    layout: str,
    *,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    kv_scales: tuple[float, float] | None = None,
) -> Path:
    """The checkpoint at `source` as others would publish it; kv_scales: of keys and of values kept in fp8."""
    store, config, _ = PUBLISHED[layout]
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    for name in [name for name in tensors if name.endswith(("_proj.weight", "_mqa.weight"))]:
        linear = name.removesuffix(".weight")
        tensors |= {f"{linear}.{part}": tensor for part, tensor in store(tensors.pop(name)).items()}
    for which, scale in zip("kv", kv_scales or (), strict=False):
        for layer in range(json.loads((source / "config.json").read_text())["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.{which}_scale"] = torch.tensor([scale])
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    if config is None:
        sidecar = {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        }
        (folder / "hf_quant_config.json").write_text(json.dumps(sidecar))
    else:
        settings["quantization_config"] = dict(config)
    if kv_scales:
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        settings["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read_whole_and_cut(
    layout: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = publish(checkpoint("llama"), tmp_path / "published", layout)
    shape = load_model_shape(str(folder))
    assert shape.quantization is not None
    precision = LAYOUTS[layout][2]
    assert shape.quantization.precision() == precision
    check_checkpoint(folder, shape, PRECISIONS[precision])
    check_checkpoint(folder, shape, PRECISIONS["bfloat16"])
    plain = load_file(checkpoint("llama") / _file(checkpoint("llama"), f"{NAME}.weight"))[f"{NAME}.weight"]
    weights = open_checkpoint(folder, shape, dtype=torch.float32)
    whole = weights.read(f"{NAME}.weight")
    error = float((whole - plain).norm() / plain.norm())
    assert 0.001 < error < (0.02 if layout.startswith("int8") else 0.04)
    for rows, columns in ((slice(0, 32), slice(None)), (slice(16, 48), slice(48, 112)), (slice(7, 9), slice(0, 16))):
        assert torch.equal(weights.read(f"{NAME}.weight", rows, columns), whole[rows, columns])
    assert torch.equal(
        weights.read("model.norm.weight"),
        open_checkpoint(checkpoint("llama"), shape_of(checkpoint)).read("model.norm.weight"),
    )


def shape_of(checkpoint: Callable[[str], Path]) -> Any:
    return load_model_shape(str(checkpoint("llama")))


def _file(folder: Path, name: str) -> str:
    return str(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name])


def test_a_cut_through_a_group_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = publish(checkpoint("llama"), tmp_path / "published", "int8 groups")
    weights = open_checkpoint(folder, load_model_shape(str(folder)))
    assert isinstance(weights, QuantizedCheckpoint)
    with pytest.raises(UserError, match=r"56 inputs a rank; must be a multiple of 16"):
        weights.stored(NAME, slice(None), slice(56, 112))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("int8 W8A8", {"weight_scale": None}, "weight: not floating point; quantized weights need scales"),
        ("int8 W8A8", {"weight_scale": torch.zeros(64, 1)}, "weight_scale: 0.0; scales must be finite"),
        ("int8 W8A8", {"weight_scale": torch.full((64, 1), torch.nan)}, "weight_scale: nan; scales must"),
        ("int8 W8A8", {"weight_scale": torch.ones(63, 1)}, "weight_scale: shape [63, 1]; must be [64, 1]"),
        ("int8 W8A8", {"weight": torch.zeros(64, 112).half()}, "weight: F16; must be I8"),
        ("int8 W8A8", {"weight": torch.zeros(64, 100).char()}, "weight: shape [64, 100]; must be"),
        ("fp8 blocks", {"weight_scale_inv": torch.ones(4, 6)}, "weight_scale_inv: shape [4, 6]; must be [4, 7]"),
        ("ModelOpt FP8", {"input_scale": None}, "input_scale: missing; must be in the weights"),
        ("ModelOpt FP8", {"input_scale": torch.tensor(-1.0)}, "input_scale: -1.0; scales must be"),
    ],
)
def test_wrong_scales_are_named(
    layout: str, change: dict[str, torch.Tensor | None], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in change.items():
            if tensor is None:
                del tensors[f"{NAME}.{name}"]
            else:
                tensors[f"{NAME}.{name}"] = tensor

    folder = publish(checkpoint("llama"), tmp_path / "published", layout, change=spoil)
    with pytest.raises(UserError) as refused:
        check_checkpoint(folder, load_model_shape(str(folder)), PRECISIONS[LAYOUTS[layout][2]])
    assert str(refused.value).startswith(f"{NAME}.{message}")


@pytest.mark.parametrize(
    ("layout", "precision", "message"),
    [
        ("int8 W8A8", "fp8", "its weights are int8: run it in w8a8 or"),
        ("int8 W8A8", "w8a8-static", "it holds no ranges of activations"),
        ("int8 groups", "w8a8", "scales for groups of inputs: run it in w8a16"),
        ("ModelOpt FP8", "w8a8", "its weights are float8_e4m3fn: run it in fp8-static"),
    ],
)
def test_a_precision_that_the_weights_do_not_serve_is_refused(
    layout: str, precision: str, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = publish(checkpoint("llama"), tmp_path / "published", layout)
    with pytest.raises(UserError, match=message):
        check_checkpoint(folder, load_model_shape(str(folder)), PRECISIONS[precision])


def test_plain_weights_have_no_ranges(checkpoint: Callable[[str], Path]) -> None:
    shape = shape_of(checkpoint)
    with pytest.raises(UserError, match=r"precision: w8a8-static; needs ranges of activations: calibrate"):
        check_checkpoint(checkpoint("llama"), shape, PRECISIONS["w8a8-static"])
    check_checkpoint(checkpoint("llama"), shape, PRECISIONS["w8a8"])


def test_a_checkpoint_half_written_is_one_line(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = publish(checkpoint("llama"), tmp_path / "published", "int8 W8A8")
    shape, path = load_model_shape(str(folder)), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"^weights: .*must be a safetensors file") as refused:
        check_checkpoint(folder, shape, PRECISIONS["w8a8"])
    assert "\n" not in str(refused.value)

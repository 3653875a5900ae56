"""What configurations say of quantized linears, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from profiler.model import PRECISIONS, load_model_shape, model_from_config
from profiler.model.precision import E4M3, INT8, Ranges
from profiler.model.quantization import Storage, quantization_of
from profiler.model.shape import default_dtype
from tests.profiler.model.test_configuration import LLAMA

INT8_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8_CHANNEL = INT8_CHANNEL | {"type": "float"}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = DYNAMIC | {"strategy": "tensor", "dynamic": False}


def compressed(weights: Any, activations: Any = None, *, file_format: str = "int-quantized", **more: Any) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": file_format, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("config", "precision", "storage", "scales"),
    [
        (compressed(INT8_CHANNEL, DYNAMIC), "w8a8", Storage.VALUES, (1, None)),
        (compressed(INT8_CHANNEL, STATIC), "w8a8-static", Storage.VALUES, (1, None)),
        (compressed(INT8_CHANNEL, file_format="pack-quantized"), "w8a16", Storage.PACKED, (1, None)),
        (
            compressed(INT8_CHANNEL | {"strategy": "group", "group_size": 64}, file_format="pack-quantized"),
            "w8a16", Storage.PACKED, (1, 64),
        ),
        (
            compressed(FP8_CHANNEL, DYNAMIC | {"type": "float"}, file_format="float-quantized"),
            "fp8", Storage.VALUES, (1, None),
        ),
        (
            compressed(FP8_CHANNEL | {"strategy": "tensor"}, STATIC | {"type": "float"}, file_format="naive-quantized"),
            "fp8-static", Storage.VALUES, (None, None),
        ),
        ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "w8a16", Storage.BLOCKS, (128, 128)),
        ({"quant_algo": "FP8", "ignore": ["lm_head"]}, "fp8-static", Storage.VALUES, (None, None)),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"W8A8": ["Linear"]}},
            "w8a8", Storage.VALUES, (1, None),
        ),
    ],
)  # fmt: skip
def test_published_layouts_are_understood(
    config: Any, precision: str, storage: Storage, scales: tuple[int | None, int | None]
) -> None:
    quantization = quantization_of({"quantization_config": config})
    assert quantization is not None
    assert quantization.precision() == precision
    assert quantization.storage is storage
    assert (quantization.scale_rows, quantization.scale_columns) == scales


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: gptq; cannot be read; what can: "),
        ({"quant_method": "awq"}, "quantization_config: awq; "),
        ({"quant_method": "mxfp4"}, "quantization_config: mxfp4; "),
        ({"quant_algo": "NVFP4"}, "quantization_config.quant_algo: NVFP4; "),
        ({"quant_method": "fp8"}, "quantization_config.weight_block_size: missing; "),
        (compressed(INT8_CHANNEL | {"num_bits": 4}), "quantization_config.weights.num_bits: 4; "),
        (compressed(INT8_CHANNEL | {"symmetric": False}), "quantization_config.weights.symmetric: false; "),
        (compressed(INT8_CHANNEL, file_format="marlin-24"), "quantization_config.format: marlin-24; "),
        (compressed(INT8_CHANNEL, DYNAMIC | {"type": "float"}), "quantization_config.input_activations.type: "),
        (compressed(INT8_CHANNEL, DYNAMIC | {"strategy": "group"}), "quantization_config.input_activations: group"),
        (compressed(INT8_CHANNEL, quantization_status="frozen"), "quantization_config.quantization_status: frozen; "),
        (compressed(5), "quantization_config.config_groups.group_0.weights: 5; must be an object"),
        (compressed(INT8_CHANNEL, 5), "quantization_config.config_groups.group_0.input_activations: 5; must be"),
        (compressed(INT8_CHANNEL, ignore=5), "quantization_config.ignore: 5; must be a list of names"),
        (
            compressed(INT8_CHANNEL | {"strategy": "group", "group_size": True}),
            "quantization_config.weights.group_size",
        ),
        (compressed(INT8_CHANNEL | {"strategy": "block"}), "quantization_config.weight_block_size: None; must be two"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "quantization_config.weight_block_size: 128; must be"),
        (compressed(INT8_CHANNEL) | {"config_groups": {}}, "quantization_config.config_groups: "),
        (compressed(INT8_CHANNEL) | {"config_groups": {"g": 5}}, "quantization_config.config_groups.g: 5; must be an"),
        (compressed(INT8_CHANNEL, ignore=["re:("]), "quantization_config.ignore: re:(; must be a regular expression"),
        (compressed(INT8_CHANNEL) | {"config_groups": {"NVFP4": ["Linear"]}}, "quantization_config.config_groups: NV"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: Any, message: str) -> None:
    try:
        reason = model_from_config(LLAMA | {"quantization_config": config}, name="m").unread
    except UserError as refused:
        reason = str(refused)
    assert str(reason).startswith(message)


def test_a_model_keeps_the_linears_that_its_checkpoint_keeps() -> None:
    config = compressed(
        INT8_CHANNEL, DYNAMIC, ignore=["lm_head", "re:.*layers.1.*down_proj", "model.layers.0.self_attn"]
    )
    shape = model_from_config(LLAMA | {"quantization_config": config}, name="m")
    kept = [{linear.name for linear in layer.linears if linear.kept} for layer in shape.layers]
    assert kept[:2] == [{"qkv", "o"}, {"down"}]
    assert not any(kept[2:])
    assert shape.fingerprint != model_from_config(LLAMA, name="m").fingerprint
    with pytest.raises(UserError, match=r"q_proj; is plain, so all of .*v_proj must be"):
        quantized = compressed(INT8_CHANNEL, DYNAMIC, ignore=["model.layers.0.self_attn.q_proj"])
        model_from_config(LLAMA | {"quantization_config": quantized}, name="m")


def test_a_sidecar_counts_as_part_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"dtype": "bfloat16"}))
    sidecar = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(sidecar))
    shape = load_model_shape(str(tmp_path))
    assert default_dtype(shape, "cuda") == "fp8-static"
    assert default_dtype(shape, "cpu") == "fp8-static+float32"
    sidecar["quantization"] = {"quant_algo": "NVFP4"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(sidecar))
    unread = load_model_shape(str(tmp_path))
    assert (unread.weight_format, unread.quantization) == ("nvfp4", None)
    assert str(unread.unread).startswith("quantization_config.quant_algo: NVFP4; cannot be read")
    assert default_dtype(unread, "cuda") == "bfloat16"


@pytest.mark.parametrize(("name", "weights"), [("w8a8", INT8), ("w8a16+float32", INT8), ("fp8-static", E4M3)])
def test_quantized_linears_take_a_byte_a_weight_and_four_an_output(name: str, weights: object) -> None:
    precision = PRECISIONS[name]
    assert precision.linears is not None
    assert precision.linears.weights == weights
    assert precision.matrix_bytes(48, 64) == 48 * 64 + 48 * 4
    assert precision.matrix_bytes(48, 64, kept=True) == precision.activations.num_bytes(48 * 64)
    shape = load_model_shape("llama-3-8b")
    layer, plain = shape.layers[0], PRECISIONS[precision.activations.name]
    matrices = layer.product_elements()
    outputs = sum(n for n, _ in layer.products().values())
    saved = plain.weights.num_bytes(matrices) - matrices - 4 * outputs
    assert layer.weights_bytes(plain) - layer.weights_bytes(precision) == saved
    kept = layer.keeping({"down"})
    assert kept.weights_bytes(precision) - layer.weights_bytes(precision) == (
        plain.weights.num_bytes(4096 * 14336) - 4096 * 14336 - 4 * 4096
    )


def test_peaks_are_told_against_16_bits_and_against_the_products_own() -> None:
    card = "NVIDIA H100 80GB HBM3"
    assert PRECISIONS["w8a8"].peak_flops(card) == PRECISIONS["bfloat16"].peak_flops(card) == 989.5e12
    assert PRECISIONS["w8a8"].product_peak_flops(card) == PRECISIONS["fp8"].product_peak_flops(card) == 1979e12
    assert PRECISIONS["w8a16"].product_peak_flops(card) == 989.5e12
    assert PRECISIONS["fp8"].product_peak_flops("NVIDIA A100-SXM4-80GB") is None
    linears = PRECISIONS["w8a8-static"].linears
    assert linears is not None
    assert linears.is_calibrated
    assert linears.ranges is Ranges.STATIC

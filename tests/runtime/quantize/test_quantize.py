"""A checkpoint made 8-bit: what is written, what it costs, and that nothing is left of one that could not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.kernels.quantized.weight import Observer
from profiler.model import PRECISIONS, load_model_shape
from profiler.model.precision import E4M3
from runtime.quantize.quantize import packed, quantize_checkpoint
from runtime.quantize.ranges import InputRanges
from runtime.quantize.recipe import QuantizationRecipe
from runtime.quantize.report import QuantizeReport
from runtime.quantize.texts import read_sequences
from runtime.run.prompts import Tokenizer
from runtime.run.reference import load_reference, rounding_cache
from runtime.weights.checkpoint import INDEX
from runtime.weights.quantized import check_checkpoint
from tests.runtime.cases import prompts

CPU = torch.device("cpu")
CALIBRATION, HELD_OUT = prompts(300, 211), prompts(90, 150, 60)
Make = Callable[..., QuantizeReport]


@pytest.fixture
def quantize(checkpoint: Callable[[str], Path], tmp_path: Path) -> Make:
    def run(
        variant: str = "llama", precision: str = "w8a8-static", folder: str = "made", **recipe: Any
    ) -> QuantizeReport:
        source = checkpoint(variant)
        linears = PRECISIONS[precision].linears
        assert linears is not None
        return quantize_checkpoint(
            source, tmp_path / folder, load_model_shape(str(source)), PRECISIONS[precision],
            QuantizationRecipe(linears=linears, **recipe), calibration=CALIBRATION, held_out=HELD_OUT, device=CPU,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        *(("llama", precision) for precision in ("w8a16", "w8a8", "w8a8-static", "fp8", "fp8-static")),
        ("phi3", "w8a8-static"),
        ("olmo2", "fp8-static"),
        ("llama-bias-one-kv-head", "w8a8-static"),
    ],
)
def test_what_is_written_is_read_and_costs_little(
    variant: str, precision: str, quantize: Make, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    report = quantize(variant, precision, smooth=0.5)
    shape = load_model_shape(str(tmp_path / "made"))
    assert shape.quantization is not None
    assert shape.quantization.precision() == precision
    check_checkpoint(tmp_path / "made", shape, PRECISIONS[precision])
    assert len(report.linears) == 4 * shape.num_layers
    worst = 0.01 if "w8" in precision else 0.04
    assert all(0.001 < one.weight_error < worst for one in report.linears)
    assert all(one.output_error is not None and one.output_error < 6 * worst for one in report.linears)
    assert report.perplexity_loss is not None
    assert abs(report.perplexity_loss) < 0.05
    assert report.written_bytes < report.source_bytes
    ids = torch.tensor(prompts(50))
    with torch.inference_mode():
        exact = load_reference(checkpoint(variant), PRECISIONS["float32"])(ids).logits
        made = load_reference(tmp_path / "made", PRECISIONS[f"{precision}+float32"])(ids).logits
    error = float((made - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.15


def test_perplexity_is_that_of_transformers(quantize: Make, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = quantize("qwen3", "w8a8")
    for folder, precision, found in (
        (checkpoint("qwen3"), "float32", report.perplexity_before),
        (tmp_path / "made", "w8a8+float32", report.perplexity_after),
    ):
        model = load_reference(folder, PRECISIONS[precision])
        losses = []
        with torch.inference_mode():
            for ids in HELD_OUT:
                logits = model(torch.tensor([ids])).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
        assert found == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-3)


def test_keys_and_values_in_8_bits_are_calibrated_and_judged(quantize: Make, tmp_path: Path) -> None:
    report = quantize("llama", "w8a8-static", kv=E4M3)
    folder, name = tmp_path / "made", "w8a8-static+float32+kv-fp8"
    shape = load_model_shape(str(folder))
    assert shape.quantization is not None
    assert report.precision == shape.quantization.precision() == "w8a8-static+kv-fp8"
    check_checkpoint(folder, shape, PRECISIONS[name])
    model, losses = load_reference(folder, PRECISIONS[name]), []
    with torch.inference_mode():
        for ids in HELD_OUT:
            cache = rounding_cache(folder, PRECISIONS[name])
            logits = model(torch.tensor([ids]), past_key_values=cache).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    assert report.perplexity_after == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-3)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.1.self_attn.v_scale"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_scale: missing"):
        check_checkpoint(folder, shape, PRECISIONS[name])
    with pytest.raises(UserError, match="its keys and values have scales for float8_e4m3fn"):
        check_checkpoint(folder, shape, PRECISIONS["w8a8-static+float32+kv-int8"])


def test_smoothing_gets_back_what_an_outlier_channel_costs(
    checkpoint: Callable[[str], Path], tmp_path: Path, quantize: Make
) -> None:
    """One channel of a norm is made 60 times as wide, and the columns that it meets as much smaller."""

    source = tmp_path / "outliers"
    source.mkdir()
    for path in checkpoint("llama").iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if "layernorm.weight" in name:
                    tensor[5] *= 60.0
                elif any(part in name for part in ("q_proj.w", "k_proj.w", "v_proj.w", "gate_proj.w", "up_proj.w")):
                    tensor[:, 5] /= 60.0
            save_file(tensors, source / path.name)
        else:
            (source / path.name).write_bytes(path.read_bytes())
    linears = PRECISIONS["w8a8"].linears
    assert linears is not None
    errors = {}
    for smooth in (None, 0.5):
        report = quantize_checkpoint(
            source, tmp_path / f"smooth-{smooth}", load_model_shape(str(source)), PRECISIONS["w8a8"],
            QuantizationRecipe(linears=linears, smooth=smooth), calibration=CALIBRATION, device=CPU,
        )  # fmt: skip
        errors[smooth] = max(one.output_error or 0.0 for one in report.linears if one.linear in ("qkv", "gate_up"))
        assert max(one.outlier_ratio or 0.0 for one in report.linears) > 20
    assert errors[0.5] < 0.3 * errors[None]


def test_linears_may_stay_plain(quantize: Make, tmp_path: Path) -> None:
    report = quantize(keep=("down_proj", "model.layers.1.self_attn.q_proj"))
    shape = load_model_shape(str(tmp_path / "made"))
    kept = [{linear.name for linear in layer.linears if linear.kept} for layer in shape.layers]
    assert kept == [{"down"}, {"down", "qkv"}, {"down"}, {"down"}, {"down"}]
    assert {(one.layer, one.linear) for one in report.linears if one.kept} == {
        (index, name) for index, names in enumerate(kept) for name in names
    }
    check_checkpoint(tmp_path / "made", shape, PRECISIONS["w8a8-static"])


def test_groups_have_scales_of_their_own(quantize: Make, tmp_path: Path) -> None:
    grouped = quantize(precision="w8a16", group_size=16, folder="grouped")
    whole = quantize(precision="w8a16", folder="whole")
    assert all(a.weight_error < b.weight_error for a, b in zip(grouped.linears, whole.linears, strict=True))
    shape = load_model_shape(str(tmp_path / "grouped"))
    check_checkpoint(tmp_path / "grouped", shape, PRECISIONS["w8a16"])


def test_packed_words_hold_four_numbers_each() -> None:
    values = torch.tensor([[-128, -1, 0, 127, 5]], dtype=torch.int8)
    words = packed(values)
    assert words.shape == (1, 2)
    assert words.view(torch.uint8).tolist() == [[0, 127, 128, 255, 133, 128, 128, 128]]


def test_an_offset_fits_a_one_sided_range() -> None:
    ranges = InputRanges()
    ranges.see(torch.tensor([[0.0, 2.0], [10.0, 1.0]]))
    scale, offset = ranges.static(torch.int8, Observer.MINMAX, asymmetric=True)
    assert scale.item() == pytest.approx(10.0 / 255.0)
    assert offset == -128.0
    scale, offset = ranges.static(torch.int8, Observer.MINMAX, asymmetric=False)
    assert (scale.item(), offset) == (pytest.approx(10.0 / 127.5), 0.0)


def test_ranges_of_two_texts_are_those_of_both() -> None:
    one, two = torch.randn(30, 8), torch.randn(50, 8) * 3
    apart, together = InputRanges(), InputRanges()
    apart.see(one)
    apart.see(two)
    together.see(torch.cat([one, two]))
    assert torch.equal(apart.channel_ends, together.channel_ends)
    assert apart.num_tokens == 80


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"keep": ("nothing",)}, "--keep: nothing; fits no linear"),
        ({"precision": "w8a8", "group_size": 16}, "--group-size: 16; only w8a16"),
        ({"precision": "w8a16", "group_size": 48}, "--group-size: 48; must divide"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    recipe: dict[str, Any], message: str, quantize: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        quantize(**recipe)
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_is_interrupted_leaves_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, linears = checkpoint("llama"), PRECISIONS["w8a8"].linears
    assert linears is not None

    def interrupt(layer: int) -> None:
        if layer == 2:
            assert [path.name for path in tmp_path.iterdir()] != []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            source, tmp_path / "made", load_model_shape(str(source)), PRECISIONS["w8a8"],
            QuantizationRecipe(linears=linears), device=CPU, progress=interrupt,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_quantized_checkpoints_and_missing_calibration_are_refused(
    quantize: Make, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize()
    made, linears = tmp_path / "made", PRECISIONS["w8a8-static"].linears
    assert linears is not None
    for source, message in ((made, "is quantized already"), (checkpoint("llama"), "--calibration: missing")):
        with pytest.raises(UserError, match=message):
            quantize_checkpoint(
                source, tmp_path / "again", load_model_shape(str(source)), PRECISIONS["w8a8-static"],
                QuantizationRecipe(linears=linears), device=CPU,
            )  # fmt: skip
    with pytest.raises(UserError, match=r"--output: .*made; exists already"):
        quantize()


def test_texts_that_cannot_calibrate_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shape, tokenizer = load_model_shape(str(checkpoint("llama"))), Tokenizer(checkpoint("llama"))
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"id": "a", "token_ids": [1, 2, 211]}) + "\n")
    with pytest.raises(UserError, match=r"line 1: token_ids: 211; 0 to 210"):
        read_sequences(path, tokenizer, shape, field="--calibration")
    path.write_text(json.dumps({"id": "a", "token_ids": [1, 2, 3]}) + "\n")
    with pytest.raises(UserError, match=r"--calibration: .*; 3 tokens in it: at least 64 are needed"):
        read_sequences(path, tokenizer, shape, field="--calibration")
    with pytest.raises(UserError, match=r"--calibration: .*none.txt; must be a readable file"):
        read_sequences(tmp_path / "none.txt", tokenizer, shape, field="--calibration")
    path.write_text(json.dumps({"id": "a", "token_ids": list(range(200)) * 6}) + "\n")
    pieces = read_sequences(path, tokenizer, shape, field="--calibration")
    assert [len(piece) for piece in pieces] == [512, 512, 176]

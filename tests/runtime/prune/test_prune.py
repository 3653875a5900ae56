"""A checkpoint made smaller: what goes does what was asked for, and what is written runs as Transformers runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from db.errors import UserError
from profiler.model import PRECISIONS, load_model_shape
from runtime.prune.budget import Losses, Sizes, layer_order
from runtime.prune.importance import Measure, find_importance
from runtime.prune.prices import ChunkWork, Prices
from runtime.prune.prune import PruneReport, Wanted, choose_sizes, prune_checkpoint
from runtime.quantize.layers import perplexity
from runtime.run.reference import load_reference
from tests.runtime.cases import prompts

CPU = torch.device("cpu")
CALIBRATION, HELD_OUT = prompts(300, 211), prompts(90, 150)
WORK = ChunkWork(chunk=32, context=0, dtype=torch.float32, device=CPU)


def prune(source: Path, output: Path, measure: Measure = Measure.ACTIVATION, **wanted: Any) -> PruneReport:
    return prune_checkpoint(
        source, output, load_model_shape(str(source)), Wanted(**wanted), measure=measure, calibration=CALIBRATION,
        held_out=HELD_OUT, work=WORK, measures_speed=False,
    )  # fmt: skip


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = load_reference(folder, PRECISIONS["float32"])(torch.tensor(prompts(50))).logits
    return made


def zeroed(source: Path, folder: Path, change: Callable[[str, torch.Tensor], None]) -> Path:
    """A copy of a checkpoint in which some numbers are zero."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                change(name, tensor)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("variant", ["llama", "phi3", "qwen2"])
def test_units_that_add_nothing_go_without_a_trace(
    variant: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Half of the channels and one KV head of each layer and a whole layer do nothing: they are what goes."""

    def silence(name: str, tensor: torch.Tensor) -> None:
        if name.endswith("down_proj.weight"):
            tensor[:, ::2] = 0.0
        if name.endswith("o_proj.weight"):
            tensor[:, :32] = 0.0
        if ".layers.2." in name and name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias")):
            tensor.zero_()

    source = zeroed(checkpoint(variant), tmp_path / "source", silence)
    report = prune(source, tmp_path / "made", channels=0.5, heads=0.5, layers=0.2, multiple=8)
    assert report.removed_layers == (2,)
    assert report.after == Sizes(layers=4, channels=56, kv_heads=1, hidden=64)
    assert report.lost_importance < 1e-9
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-5)
    assert torch.allclose(logits(tmp_path / "made"), logits(source), atol=1e-4)
    made = load_model_shape(str(tmp_path / "made"))
    assert made.num_parameters == report.parameters_after < report.parameters_before
    assert report.flops_after < 0.7 * report.flops_before


def test_each_layer_loses_what_it_does_not_need(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers with other numbers of idle channels get other widths, where one width for all would cost something."""
    idle = (64, 0, 96, 16, 0)

    def silence(name: str, tensor: torch.Tensor) -> None:
        if name.endswith("down_proj.weight"):
            tensor[:, : idle[int(name.split(".")[2])]] = 0.0

    source = zeroed(checkpoint("llama"), tmp_path / "source", silence)
    report = prune(source, tmp_path / "made", size=0.82, each_layer=True, multiple=8)
    assert report.widths is not None
    assert all(112 - lost <= channels for (channels, _), lost in zip(report.widths, idle, strict=True))
    assert len(set(report.widths)) > 1
    assert {kv_heads for _, kv_heads in report.widths} == {2}
    assert report.lost_importance < 1e-9
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-5)
    assert report.parameters_after < report.parameters_before
    assert prune(source, tmp_path / "uniform", size=0.82, multiple=8).lost_importance > 1e-6
    made = load_model_shape(str(tmp_path / "made"))
    assert [layer.mlp.intermediate.count for layer in made.layers] == [channels for channels, _ in report.widths]


def test_features_that_carry_nothing_go(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A norm divides by the root mean square of what is left, which its weight makes up for."""
    dead = torch.arange(0, 64, 4)

    def silence(name: str, tensor: torch.Tensor) -> None:
        if "embed" in name or "lm_head" in name:
            tensor[:, dead] = 0.0
        elif name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            tensor[dead] = 0.0

    source = zeroed(checkpoint("llama-bias-one-kv-head"), tmp_path / "source", silence)
    report = prune(source, tmp_path / "made", hidden=0.25, multiple=8)
    assert report.after.hidden == 48
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-4)
    assert torch.allclose(logits(tmp_path / "made"), logits(source), atol=1e-3)


def test_perplexity_is_that_of_transformers(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3")
    model, found = load_reference(folder, PRECISIONS["float32"]), []
    with torch.inference_mode():
        for ids in HELD_OUT:
            made = model(torch.tensor([ids])).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(made, torch.tensor(ids[1:]), reduction="none"))
    expected = float(torch.cat(found).mean().exp())
    assert perplexity(folder, load_model_shape(str(folder)), HELD_OUT, CPU) == pytest.approx(expected, rel=1e-4)


def test_layers_are_judged_by_the_loss_without_each(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    shape, text = load_model_shape(str(folder)), torch.tensor(CALIBRATION[0])
    model = load_reference(folder, PRECISIONS["float32"])
    losses, layers = [], list(model.model.layers)
    with torch.inference_mode():
        for lacking in (None, *range(len(layers))):
            model.model.layers = torch.nn.ModuleList(one for index, one in enumerate(layers) if index != lacking)
            made = model(text[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(made, text[1:])))
    model.model.layers = torch.nn.ModuleList(layers)
    lost = [max(loss - losses[0], 0.0) for loss in losses[1:]]
    plain, judged = (
        find_importance(folder, shape, Measure.ACTIVATION, CALIBRATION[:1], CPU, judges_layers=judges)
        for judges in (False, True)
    )
    assert max(lost) > 0.0
    added = [layer.whole for layer in plain.layers]
    expected = [sum(added) * loss / sum(lost) + 1e-3 * own for loss, own in zip(lost, added, strict=True)]
    assert [layer.whole for layer in judged.layers] == pytest.approx(expected, rel=0.01, abs=1e-4)
    assert layer_order(judged) == sorted(range(5), key=expected.__getitem__)


def test_a_budget_takes_from_where_it_costs_least(checkpoint: Callable[[str], Path]) -> None:
    """Sizes keep more importance than equal shares of every kind at the same price."""
    folder = checkpoint("llama")
    shape = load_model_shape(str(folder))
    importance = find_importance(folder, shape, Measure.ACTIVATION, CALIBRATION, CPU)
    prices = Prices(widths=((8, 1.4), (112, 2.7)), groups=(2.2, 2.7))
    whole, losses = Sizes.of(shape), Losses.of(importance)
    sizes = choose_sizes(shape, Wanted(speedup=1.3, multiple=8), importance, prices)
    assert 1.3 <= prices.seconds(whole) / prices.seconds(sizes) < 1.36
    lost = losses.lost(
        whole.layers - sizes.layers, whole.channels - sizes.channels, whole.kv_heads - sizes.kv_heads
    )  # fmt: skip
    for layers in (3, 4, 5):
        for kv_heads in (1, 2):
            for channels in range(8, 113, 8):
                other = Sizes(layers=layers, channels=channels, kv_heads=kv_heads, hidden=64)
                if prices.seconds(whole) / prices.seconds(other) >= 1.3:
                    assert losses.lost(5 - layers, 112 - channels, 2 - kv_heads) >= lost
    small = choose_sizes(shape, Wanted(size=0.6, multiple=8), importance, None)
    assert small != whole


@pytest.mark.parametrize(
    ("variant", "wanted", "message"),
    [
        ("olmo2", {"heads": 0.5}, "--heads: 0.5"),
        ("olmo2", {"hidden": 0.5}, "--hidden: 0.5"),
        ("llama", {}, "--ffn, --heads, --layers, --hidden"),
        ("llama", {"channels": 0.5, "speedup": 1.3}, "--ffn, --heads, --layers, --hidden"),
        ("llama", {"channels": 1.0}, "--ffn: 1.0"),
        ("llama", {"channels": 0.5, "each_layer": True}, "--each-layer"),
        ("llama", {"speedup": 1.0}, "--speedup: 1.0"),
    ],
)
def test_what_cannot_go_is_refused(
    variant: str, wanted: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        prune(checkpoint(variant), tmp_path / "made", **wanted)
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measure", [Measure.MAGNITUDE, Measure.RANDOM])
def test_baselines_need_no_text(measure: Measure, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    report = prune_checkpoint(
        source, tmp_path / "made", load_model_shape(str(source)), Wanted(channels=0.25, heads=0.5, multiple=16),
        measure=measure, work=WORK,
    )  # fmt: skip
    assert report.after.channels == 96
    assert report.perplexity_after is None
    assert report.measured_speedup is not None
    assert report.predicted_speedup is not None
    assert logits(tmp_path / "made").isfinite().all()

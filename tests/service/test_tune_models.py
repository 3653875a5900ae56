"""`isochunk tune` on models whose layers differ, and on weights in a format that is not read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from db.rows.measurements import Measurement, save_measurements
from db.store.engine import open_database
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.measure.point_rows import row_of
from profiler.measure.timing import Samples, summarize
from profiler.model import load_model_shape
from profiler.points.grid import Grid
from profiler.points.point import Op
from runtime.run.preparation import check_layout, model_shape
from tests.service.test_tune import HARDWARE, tune_json
from tests.tuner.fit.test_expert_costs import CONFIG, SHAPE, measured
from tests.tuner.measured import SHAPE as LLAMA
from tests.tuner.measured import Machine, measure
from tuner.plan.memory import plan_memory
from tuner.plan.plan import load_plan


def database(tmp_path: Path, rows: list[Measurement]) -> str:
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    with open_database(url) as opened:
        save_measurements(opened, HARDWARE, {row.key: row for row in rows}.values())
    return url


def folder(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "model")


@pytest.mark.parametrize("precision", [(), ("--precision", "bf16")])
def test_a_weight_format_that_is_not_read_is_planned_as_if_converted(
    precision: tuple[str, ...], tmp_path: Path
) -> None:
    quantized = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    model = folder(tmp_path, dict(LLAMA.config) | {"quantization_config": quantized})
    url = database(tmp_path, [replace(row, dtype="bfloat16") for row in measure(Machine())])
    report = tune_json(model, "--world-size", "2", "--prompt-lens", "3000", "--db", url, *precision)
    assert report["plan"]["precision"] == "bfloat16"
    assert "Planned as if the weights, nvfp4, were converted to bfloat16" in report["notes"]


def test_a_mixture_is_planned_with_its_experts_cut_and_spread(tmp_path: Path) -> None:
    grid = Grid(
        shape=SHAPE, dtype="float32", tp_sizes=(1, 2), world_size=2, context_length=4096, device_type="cpu",
        kernels=(AttentionKernel.CPU_FOLDED,),
    )  # fmt: skip
    rows = [measured(point) for point in grid.points() if point.op is not Op.LAYER]
    out = tmp_path / "plan.json"
    arguments = (folder(tmp_path, CONFIG), "--world-size", "2", "--prompt-lens", "3000,900", "--db")
    report = tune_json(*arguments, database(tmp_path, rows), "--dtype", "float32", "--tp-size", "2", "-o", str(out))
    planned = {layout["ep_size"] for layout in report["layouts"] if not layout["refusal"]}
    assert planned == {1, 2}
    plan = load_plan(out)
    shape = model_shape(plan.model, None)
    check_layout(plan, shape, max_new_tokens=1, device_type="cpu")
    spread = replace(plan, parallel=replace(plan.parallel, ep_size=2))
    cut = replace(plan, parallel=replace(plan.parallel, ep_size=1))
    (most,), (least,) = (plan_memory(shape, one, max_new_tokens=1, device_type="cpu") for one in (spread, cut))
    expert = 3 * 256 * 128
    assert most.weights_bytes - least.weights_bytes == 2 * 4 * expert // 2  # five of nine in each layer against a half


def test_layers_that_transformers_runs_on_cards_are_planned_over_stages_alone(tmp_path: Path) -> None:
    """On a card such a mixture has no kernels here; what was measured on one machine stands for two."""
    model = folder(tmp_path, CONFIG | {"num_hidden_layers": 5})
    grid = Grid(
        shape=load_model_shape(model, backend="transformers"), dtype="float32", tp_sizes=(1,), world_size=2,
        context_length=4096, device_type="cuda", kernels=(AttentionKernel.SDPA,),
    )  # fmt: skip
    rows = [row_of(point, summarize(Samples([20.0 + 1e-6 * point.flops] * 3, [False] * 3))) for point in grid.points()]
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    with open_database(url) as opened:
        save_measurements(opened, replace(HARDWARE, backend="nccl", device_count=2), rows)
    report = tune_json(model, "--world-size", "4", "--prompt-lens", "3000", "--dtype", "float32", "--db", url)
    planned = [layout for layout in report["layouts"] if not layout["refusal"]]
    assert {(layout["tp_size"], layout["virtual_stages"]) for layout in planned} == {(1, 1)}
    (found,) = (layout["alike"] for layout in planned if layout["pp_size"] == 4)
    assert found == [
        "4 ranks at work, as 2",
        "messages between hosts, as those of one with 2 cards (--topology tells more)",
    ]

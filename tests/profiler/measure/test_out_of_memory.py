"""A point that one rank's memory does not hold is left out on all, and the profile goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from db.rows.hardware import list_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.points.grid import Grid
from profiler.points.point import Op, Point
from tests.profiler.measure import workers

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.timeout(200)
def test_a_point_without_memory_on_one_rank_is_left_out_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    url = f"sqlite:///{tmp_path / 'profile.db'}"
    points = Grid.points

    def few_points(grid: Grid) -> list[Point]:
        """The first of each operation, alone and beside another rank."""
        return list({(point.op, point.busy_ranks): point for point in reversed(points(grid))}.values())

    monkeypatch.setattr(Grid, "points", few_points)
    monkeypatch.setattr("profiler.measure.profile.profile_rank", workers.products_do_not_fit)
    summary = profile_model(
        ProfileOptions(
            model=str(tmp_path),
            world_size=2,
            tp_sizes="1",
            context_length=16,
            device_type="cpu",
            threads_per_rank=1,
            budget_s=150.0,
            db_url=url,
        )
    )
    with open_database(url, read_only=True) as database:
        (known,) = list_hardware(database)
        measured = {(row.op, row.busy_ranks) for row in load_measurements(database, known.hardware)}
    # With one busy rank it is the first, whose memory suffices.
    assert (Op.MATMUL, 2) not in measured and (Op.MATMUL, 1) in measured
    assert {(Op.ATTENTION, 2), (Op.ELEMENTWISE, 2), (Op.ALL_REDUCE, 2)} <= measured
    assert next(op.num_missing for op in summary.ops if op.op == Op.MATMUL) == summary.num_missing > 0

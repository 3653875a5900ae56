"""Groups of ranks that stand apart, and collectives and products side by side, as far as a CPU can run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from db.rows.hardware import list_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.comm.ranks.launch import run_ranks
from profiler.measure.operations.side_by_side import OUTLASTS, num_calls
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.points.grid import Grid
from profiler.points.point import BESIDE, Op, Point
from profiler.points.rank_groups import RankGroups
from tests.profiler.measure import workers
from tests.profiler.measure.test_out_of_memory import CONFIG


def test_the_other_work_outlasts_the_timed_one() -> None:
    for mine_s, other_s in ((1.0, 0.3), (0.1, 5.0), (2.0, 2.0)):
        calls = num_calls(mine_s, other_s)
        assert calls * other_s >= OUTLASTS * mine_s
        assert (calls - 1) * other_s < OUTLASTS * mine_s or calls == 1


@pytest.mark.timeout(200)
def test_groups_of_ranks_apart_gather_from_one_another() -> None:
    forms = [RankGroups(2), RankGroups(2, 2), RankGroups(4)]
    found = run_ranks(workers.ranks_gathered, forms, world_size=4, device_type="cpu", num_threads=1)
    for rank, groups in enumerate(found):
        assert groups == [next(ranks for ranks in form.of(4) if rank in ranks) for form in forms]


@pytest.mark.timeout(300)
def test_points_side_by_side_become_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU one comes after the other; the points are made and timed by the same code."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    url = f"sqlite:///{tmp_path / 'profile.db'}"
    points = Grid.points

    def few_points(grid: Grid) -> list[Point]:
        n, k = grid.shape.layer.products()["qkv"]
        product = Point(
            op=Op.MATMUL, dtype=grid.dtype, shape={"m": 16, "n": n, "k": k}, group_size=2, busy_ranks=4,
            variant=BESIDE, flops=1e4,
        )  # fmt: skip
        gather = Point(
            op=Op.ALL_GATHER, dtype=grid.dtype, shape={"bytes": 1024}, group_size=2, busy_ranks=4, variant=BESIDE
        )
        return [*(point for point in points(grid) if point.op is Op.ALL_GATHER), gather, product]

    monkeypatch.setattr(Grid, "points", few_points)
    profile_model(
        ProfileOptions(
            model=str(tmp_path),
            world_size=4,
            tp_sizes="1,2",
            sp_sizes="2",
            context_length=16,
            device_type="cpu",
            threads_per_rank=1,
            budget_s=200.0,
            db_url=url,
        )
    )
    with open_database(url, read_only=True) as database:
        (known,) = list_hardware(database)
        rows = [row for row in load_measurements(database, known.hardware) if row.group_size == 2]
    found = {(row.op, row.variant) for row in rows}
    assert {(Op.ALL_GATHER, ""), (Op.ALL_GATHER, BESIDE), (Op.ALL_GATHER, "stride-2"), (Op.MATMUL, BESIDE)} == found

"""`isochunk profile` of a mixture with windows and sinks on own kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from db.rows.hardware import list_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.points.point import Op
from service.cli.main import cli


def call(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)
    return done.stdout


@pytest.mark.timeout(300)
def test_every_part_of_a_mixture_is_measured(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    model, url = str(checkpoint("GptOssForCausalLM")), f"sqlite:///{tmp_path / 'rows.db'}"
    on = ("--world-size", "2", "--db", url, "--dtype", "float32")
    small = ("--context-length", "64", "--tp-sizes", "2", "--threads-per-rank", "1", "--budget-s", "30")
    call("profile", model, *on, "--device", "cpu", *small)
    with open_database(url, read_only=True) as database:
        (known,) = list_hardware(database)
        rows = load_measurements(database, known.hardware)
    measured = {row.op for row in rows}
    assert {Op.MATMUL, Op.EXPERTS, Op.ATTENTION, Op.ELEMENTWISE} <= measured
    assert all(row.shape["sinks"] == 1 for row in rows if row.op == Op.ATTENTION)
    assert {row.shape.get("window", 0) for row in rows if row.op == Op.ATTENTION} <= {0, 37}
    # All six with half of their features each, or half of the six.
    assert {(row.shape["held"], row.shape["features"]) for row in rows if row.op == Op.EXPERTS} <= {(6, 56), (3, 112)}

"""The table over streams: its rows are kept, and `joint` is behind in none of a sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planner_arrivals import Excess, Stream, kept_rows, measure


@pytest.mark.parametrize(
    ("lengths", "rate", "arrivals"),
    [("8192", 0.9, "regular"), ("two classes", 1.1, "bursty"), ("mixed", 0.6, "poisson")],
)
def test_joint_is_not_behind_the_best_of_all_other_policies(lengths: str, rate: float, arrivals: str) -> None:
    row = measure(Stream(model="atom", pp_size=2, lengths=lengths, rate=rate, arrivals=arrivals), 24)
    assert not Excess.of(row, row["joint"]).is_behind
    assert {"gpipe", "dp", "terapipe", "fixed:2048"} <= set(row["policies"])
    assert {"fixed", "sglang", "ascend", "joint"} <= {name.partition(":")[0] for name in row["policies"]}


def test_a_row_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    row = json.dumps({"key": "a", "policies": {}})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n{row[:-4]}")
    assert set(kept_rows(path)) == {"a"}
    assert kept_rows(tmp_path / "none.jsonl") == {}
